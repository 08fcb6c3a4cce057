"""An evaluation on a GPU gives the figures of one on the CPU, and in BF16 a floor of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from random_checkpoint import published_config, write_checkpoint, write_input_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# A token near a tie is routed, or attends, otherwise on another device; the perplexity of a random
# model, some 400, moved by 0.4 % on an H200.
PPL_TOLERANCE = 0.01


def fourge(*arguments: object) -> str:
    command = [sys.executable, "-m", "fourge.cli.main", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A checkpoint, its reference and data, as ``fourge evaluate`` takes them."""
    folder = tmp_path_factory.mktemp("gpu")
    config = published_config(
        hidden_size=256, moe_intermediate_size=128, num_hidden_layers=4, index_topk=64
    )
    source = write_checkpoint(folder / "source", config=config, traps=False)
    data = write_input_ids(folder / "ids.jsonl", sequences=12, length=160, vocab=256)
    out = folder / "out"
    fourge(
        "quantize",
        source,
        out,
        "--method",
        "max",
        "--data",
        data,
        "--device",
        "cpu",
        "--dtype",
        "float32",
    )
    return [out, "--reference", source, "--data", data, "--json"]


def evaluate(arguments: list[object], record: Path, *options: str) -> dict[str, Any]:
    return json.loads(fourge("evaluate", *arguments, "--record", record, *options))


def test_figures_equal_those_of_the_cpu(arguments: list[object], tmp_path: Path):
    same = ("--dtype", "float32")
    on_cpu = evaluate(arguments, tmp_path / "cpu", "--device", "cpu", *same)
    on_gpu = evaluate(arguments, tmp_path / "gpu", "--device", "cuda", *same)
    assert on_gpu["receipt"]["device"].startswith("cuda")
    for lane, tolerance in (("w4a16", 0.02), ("w4a4", 0.05)):
        ours, theirs = on_gpu["lanes"][lane], on_cpu["lanes"][lane]
        assert ours["kl_mean"] == pytest.approx(theirs["kl_mean"], rel=tolerance)
        for name in ("ppl_candidate", "ppl_reference"):
            assert ours[name] == pytest.approx(theirs[name], rel=PPL_TOLERANCE)


def test_bf16_has_a_floor_below_the_lanes(arguments: list[object], tmp_path: Path):
    document = evaluate(arguments, tmp_path / "gpu", "--device", "cuda")
    assert document["receipt"]["arithmetic"]["candidate"] == "bfloat16"
    floor, lane = document["floor"]["kl_mean"], document["lanes"]["w4a16"]["kl_mean"]
    assert 0 < floor < lane
