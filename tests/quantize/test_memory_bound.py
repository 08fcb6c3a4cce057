"""--memory is a bound that the operating system can confirm: peak resident memory of real runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from random_checkpoint import published_config, write_checkpoint, write_input_ids
from watched_process import MIB, roomy_folder, run_watched, smallest_memory


def make_model(folder: Path, **sizes: Any) -> Path:
    return write_checkpoint(folder, config=published_config(first_k_dense_replace=1, **sizes))


def checkpoint_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with roomy_folder(tmp_path_factory.mktemp("roomy"), needed=3 << 30) as folder:
        yield folder


@pytest.fixture(scope="module")
def large(roomy: Path) -> Path:
    """1.2 GB, most of it in one layer of 1.1 GB; an expert has 4.5 MiB, the embedding 50 MB."""
    return make_model(
        roomy / "large",
        num_hidden_layers=2,
        num_nextn_predict_layers=0,
        hidden_size=1024,
        intermediate_size=2048,
        moe_intermediate_size=768,
        n_routed_experts=240,
        vocab_size=24576,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "ids.jsonl"
    return write_input_ids(path, sequences=8, length=256, vocab=24576)


@pytest.mark.parametrize(("dtype", "spare"), [("auto", 10), ("float32", 10), ("auto", 150)])
def test_the_peak_stays_under_the_budget_whatever_the_checkpoint_weighs(
    dtype: str, spare: int, large: Path, data: Path, roomy: Path
) -> None:
    """The smallest budget, nearly, and one for some 15 experts more; both far below the weights."""
    options = ("--method", "max", "--data", data, "--dtype", dtype)
    smallest = smallest_memory("quantize", large, roomy / "refused", *options)
    budget = smallest + spare * MIB
    assert budget < 0.85 * checkpoint_bytes(large)

    out = roomy / f"out {dtype} {spare}"

    result = run_watched("quantize", large, out, *options, "--memory", budget)

    assert result.status == 0, result.stderr
    assert result.peak > 100 * MIB, "not watched"
    assert result.peak <= budget, f"{result.peak / MIB:.0f} of {budget / MIB:.0f} MiB"


def test_the_peak_does_not_grow_with_the_number_of_layers(roomy: Path) -> None:
    shape = {"hidden_size": 512, "moe_intermediate_size": 256, "n_routed_experts": 24}
    data = write_input_ids(roomy / "ids.jsonl", sequences=8, length=128, vocab=256)
    peaks, weights = {}, {}
    for layers in (4, 12):
        source = make_model(roomy / f"{layers} layers", num_hidden_layers=layers, **shape)
        weights[layers] = checkpoint_bytes(source)
        result = run_watched(
            "quantize", source, roomy / f"out {layers}", "--method", "max", "--data", data
        )
        assert result.status == 0, result.stderr
        peaks[layers] = result.peak

    assert weights[12] - weights[4] > 140 * MIB
    # Two runs of the same model differ by a few MiB.
    assert abs(peaks[12] - peaks[4]) < 16 * MIB, {n: peak / MIB for n, peak in peaks.items()}
