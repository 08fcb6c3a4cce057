"""A run on a GPU gives the codes of one on the CPU, and input scales that differ by rounding."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fourge.checkpoint.names import parse
from random_checkpoint import published_config, write_checkpoint, write_input_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# In FP32, and where nothing discrete has amplified a rounding yet: in the first sparse layer. Later
# a token near a tie may be routed elsewhere, and with it goes the largest activation.
INPUT_SCALE_TOLERANCE = 0.01
FIRST_SPARSE_LAYER = 1


def quantize(source: Path, out: Path, data: Path, *options: str) -> dict[str, torch.Tensor]:
    command = [sys.executable, "-m", "fourge.cli.main", "quantize", str(source), str(out)]
    subprocess.run([*command, "--data", str(data), *options], check=True)
    tensors: dict[str, torch.Tensor] = {}
    for path in out.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = published_config(
        hidden_size=256, moe_intermediate_size=128, num_hidden_layers=4, index_topk=128
    )
    return write_checkpoint(tmp_path_factory.mktemp("gpu") / "source", config=config, traps=False)


def test_codes_equal_those_of_the_cpu(source: Path, tmp_path: Path):
    data = write_input_ids(tmp_path / "ids.jsonl", sequences=12, length=96, vocab=256)
    same = ("--dtype", "float32", "--method", "max")
    on_cpu = quantize(source, tmp_path / "cpu", data, "--device", "cpu", *same)
    on_gpu = quantize(source, tmp_path / "gpu", data, "--device", "cuda", *same)
    assert on_cpu.keys() == on_gpu.keys()
    scales = [name for name in on_cpu if parse(name).part == "input_scale"]
    different = [
        name
        for name, expected in on_cpu.items()
        if name not in scales and not torch.equal(_bytes(on_gpu[name]), _bytes(expected))
    ]
    assert different == []
    first = [name for name in scales if parse(name).layer == FIRST_SPARSE_LAYER]
    deviation = max(float(abs(on_gpu[name] / on_cpu[name] - 1)) for name in first)
    assert deviation <= INPUT_SCALE_TOLERANCE


def test_expert_groups_change_no_bit(source: Path, tmp_path: Path):
    data = write_input_ids(tmp_path / "ids.jsonl", sequences=12, length=96, vocab=256)
    whole = quantize(source, tmp_path / "whole", data, "--device", "cuda")
    command = ["--device", "cuda", "--device-memory"]
    refused = subprocess.run(
        [sys.executable, "-m", "fourge.cli.main", "quantize", str(source), str(tmp_path / "x"),
         "--data", str(data), *command, "1KiB"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    smallest = refused.stderr.split("--device-memory ")[1].split(" ")[0]
    cut = quantize(source, tmp_path / "cut", data, *command, smallest)
    assert all(torch.equal(_bytes(cut[name]), _bytes(tensor)) for name, tensor in whole.items())


@pytest.mark.parametrize("method", ["local-hessian", "local-hessian+gptq", "local-hessian+descent"])
def test_what_is_fitted_on_a_gpu_is_as_good_as_on_the_cpu(
    method: str, source: Path, tmp_path: Path
):
    """Sums of moments differ in their rounding, so a few codes do; errors hardly."""
    data = write_input_ids(tmp_path / "ids.jsonl", sequences=12, length=96, vocab=256)
    options = ("--dtype", "float32", "--method", method)
    errors = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        quantize(source, out, data, "--device", device, *options)
        record = out / "fourge" / "statistics" / f"choices-{FIRST_SPARSE_LAYER:05d}.json"
        errors[device] = json.loads(record.read_text())["errors"]
    for lane in ("w4a16", "w4a4"):
        ours, theirs, plain = (
            sum(errors[device][name][lane])
            for device, name in (("cuda", method), ("cpu", method), ("cpu", "max"))
        )
        assert ours == pytest.approx(theirs, rel=0.01)
        assert ours < plain
