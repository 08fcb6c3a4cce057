"""Figures of the inventory."""

from pathlib import Path

from fourge.checkpoint.header import TensorInfo, read_checkpoint
from fourge.checkpoint.inventory import UNKNOWN, by_role, count_parameters, inventory, like_layers
from hollow_checkpoint import GLM_5_1, write_hollow_checkpoint


def test_glm_5_1_adds_up(tmp_path: Path):
    write_hollow_checkpoint(tmp_path / "glm", GLM_5_1, tensors_per_shard=5000)
    entries = inventory(read_checkpoint(tmp_path / "glm"))
    roles = {(entry.role, entry.dtype): entry for entry in by_role(entries)}
    assert roles["routed experts", "BF16"].tensors == 76 * 768
    assert roles["router", "F32"].parameters == 76 * 256
    assert sum(entry.parameters for entry in entries) == 753_864_139_008
    assert [run for run, _ in like_layers(entries)] == [range(3), range(3, 78), range(78, 79)]


def test_packed_codes_are_two_weights_a_byte_and_scales_none():
    prefix = "model.layers.1.mlp.experts.0.up_proj."
    assert count_parameters(TensorInfo(prefix + "weight", "U8", (4, 8), "s", 0, 32)) == 64
    assert count_parameters(TensorInfo(prefix + "weight_scale", "F8_E4M3", (4, 1), "s", 0, 4)) == 0
    assert count_parameters(TensorInfo(prefix + "input_scale", "F32", (), "s", 0, 4)) == 0


def test_unknown_tensors_are_listed_not_refused(tmp_path: Path):
    write_hollow_checkpoint(tmp_path / "glm", GLM_5_1, tensors_per_shard=60_000)
    checkpoint = read_checkpoint(tmp_path / "glm")
    checkpoint.tensors["strange"] = TensorInfo("strange", "F32", (2,), "s", 0, 8)
    (entry,) = [entry for entry in by_role(inventory(checkpoint)) if entry.role == UNKNOWN]
    assert (entry.tensors, entry.parameters, entry.bytes) == (1, 2, 8)
