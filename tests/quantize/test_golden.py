"""The quantized experts against golden bytes from nvidia-modelopt 0.47.0 (tests/golden).

Weights, block scales and weight_scale_2 must be equal bit for bit; all-zero tensors, for which
ModelOpt writes NaN scales, must have finite scales and zero codes. input_scale is compared with
what ModelOpt exports from BF16 activations (2 %), and with its figures from float32 ones (1 %:
fourge computes in float32 here, but keeps the residual stream between layers in BF16).
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from random_checkpoint import checkpoint_sha256, write_checkpoint, write_input_ids

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
SOURCE = json.loads((GOLDEN / "source.json").read_text())
BF16_TOLERANCE = 0.02
FLOAT32_TOLERANCE = 0.01
LAYOUTS = {
    "one shard a layer": {},
    "an expert over three shards": {"num_shards": 3},
    "fused experts": {"fused_experts": True},
}


class Case(NamedTuple):
    """The quantized tensors by name, and ModelOpt's; both without other tensors than experts'."""

    ours: dict[str, Tensor]
    modelopt: dict[str, Tensor]


@pytest.fixture(scope="module", params=list(LAYOUTS.values()), ids=list(LAYOUTS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("golden")
    source = write_checkpoint(
        folder / "source", config=SOURCE["config"], seed=SOURCE["seed"], **request.param
    )
    data = write_input_ids(folder / "input_ids.jsonl", **SOURCE["input_ids"])
    quantize(source, folder / "out", data)
    ours = {}
    for shard in sorted((folder / "out").glob("*.safetensors")):
        ours.update(load_file(shard))
    golden = load_file(GOLDEN / "modelopt-experts.safetensors")
    return Case({name: ours[name] for name in golden}, golden)


def quantize(source: Path, out: Path, data: Path) -> None:
    command = [sys.executable, "-m", "fourge.cli.main", "quantize"]
    command += [str(source), str(out), "--method", "max", "--data", str(data)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def is_all_zero(golden: dict[str, Tensor], projection: str) -> bool:
    """ModelOpt writes weight_scale_2 = 0 exactly for a tensor of zeros (gate and up as one)."""
    return golden[projection + ".weight_scale_2"].item() == 0


def projections(case: Case, *, all_zero: bool) -> list[str]:
    names = [name.removesuffix(".weight") for name in case.modelopt if name.endswith(".weight")]
    return [name for name in names if is_all_zero(case.modelopt, name) == all_zero]


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def test_the_random_source_is_the_one_that_modelopt_quantized():
    assert checkpoint_sha256(SOURCE["config"], seed=SOURCE["seed"]) == SOURCE["sha256"]


def test_codes_and_scales_equal_those_of_modelopt_bit_for_bit(case: Case):
    compared = projections(case, all_zero=False)
    different = [
        f"{name}.{kind}"
        for name in compared
        for kind in ("weight", "weight_scale", "weight_scale_2")
        if not torch.equal(bits(case.ours[f"{name}.{kind}"]), bits(case.modelopt[f"{name}.{kind}"]))
    ]
    assert different == []
    assert len(compared) == 42


def test_dtypes_and_shapes_are_those_of_modelopt(case: Case):
    ours = {name: (tensor.dtype, tensor.shape) for name, tensor in case.ours.items()}
    assert ours == {name: (tensor.dtype, tensor.shape) for name, tensor in case.modelopt.items()}


def test_an_all_zero_projection_has_zero_codes_and_finite_scales(case: Case):
    compared = projections(case, all_zero=True)
    for name in compared:
        assert torch.count_nonzero(case.ours[name + ".weight"]) == 0
        assert torch.isfinite(case.ours[name + ".weight_scale"].float()).all()
        assert 0 < case.ours[name + ".weight_scale_2"].item() < float("inf")
    assert len(compared) == 6


def test_input_scales_agree_with_the_exported_ones(case: Case):
    scales = [name for name in case.modelopt if name.endswith(".input_scale")]
    for name in scales:
        expected = case.modelopt[name].item()
        assert case.ours[name].item() == pytest.approx(expected, rel=BF16_TOLERANCE), name
    assert len(scales) == 48


def test_input_scales_agree_with_modelopt_on_float32_activations(case: Case):
    for name, expected in SOURCE["float32_input_scales"].items():
        found = case.ours[name + ".input_scale"].item()
        assert found == pytest.approx(expected, rel=FLOAT32_TOLERANCE), name


def test_every_expert_of_a_layer_has_the_same_input_scales(case: Case):
    for kinds in (("gate_proj", "up_proj"), ("down_proj",)):
        for layer in (1, 2):
            scales = {
                case.ours[f"model.layers.{layer}.mlp.experts.{expert}.{kind}.input_scale"].item()
                for expert in range(SOURCE["config"]["n_routed_experts"])
                for kind in kinds
            }
            assert len(scales) == 1
