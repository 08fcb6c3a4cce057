"""--memory is a bound that the operating system can confirm: peak resident memory of real runs.

The peak is VmHWM of /proc/PID/status of a freshly started interpreter, looked at while it runs;
ru_maxrss would carry over from the process that forked it.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from random_checkpoint import published_config, write_checkpoint, write_input_ids

MIB = 1 << 20


class Run(NamedTuple):
    status: int
    stderr: str
    peak: int  # bytes


def run_watched(*arguments: object) -> Run:
    """Run fourge in a new interpreter and watch its resident memory."""
    command = [sys.executable, "-m", "fourge.cli.main", *map(str, arguments)]
    peak = 0
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, high_water(process.pid))
            time.sleep(0.005)
        assert process.stderr is not None
        return Run(process.returncode, process.stderr.read(), peak)


def high_water(pid: int) -> int:
    """VmHWM in bytes; 0 when the process is gone."""
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def make_model(folder: Path, **sizes: Any) -> Path:
    return write_checkpoint(folder, config=published_config(first_k_dense_replace=1, **sizes))


def checkpoint_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def smallest_memory(source: Path, options: tuple[object, ...], out: Path) -> int:
    """What a run that was given too little says that it needs, in bytes."""
    result = run_watched("quantize", source, out, *options, "--memory", "100MiB")
    assert result.status == 2, result.stderr
    units = {"MiB": MIB, "GiB": 1024 * MIB}
    sizes = re.findall(r"([\d.]+) ?(MiB|GiB)", result.stderr)
    return max(int(float(number) * units[unit]) for number, unit in sizes)


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory if there is room: else every run would wait for the disk to take 1 GB."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or shutil.disk_usage(shared).free < 3 << 30:
        yield tmp_path_factory.mktemp("roomy")
        return
    with tempfile.TemporaryDirectory(dir=shared, prefix="fourge-test-") as folder:
        yield Path(folder)


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
    options = ("--data", data, "--dtype", dtype)
    smallest = smallest_memory(large, options, roomy / "refused")
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
        result = run_watched("quantize", source, roomy / f"out {layers}", "--data", data)
        assert result.status == 0, result.stderr
        peaks[layers] = result.peak

    assert weights[12] - weights[4] > 140 * MIB
    # Two runs of the same model differ by a few MiB.
    assert abs(peaks[12] - peaks[4]) < 16 * MIB, {n: peak / MIB for n, peak in peaks.items()}
