"""The table knows every tensor of the families, and nothing else."""

import pytest

from fourge.checkpoint.header import TensorInfo
from fourge.checkpoint.names import Role, expert_name, find, parse, split_fused
from fourge.errors import CheckpointError
from fourge.models.config import from_dict
from fourge.models.tensors import expected_tensors
from hollow_checkpoint import GLM_5_1


def test_every_tensor_of_glm_5_1_has_a_role():
    names = expected_tensors(from_dict(dict(GLM_5_1)))
    roles = [parse(name).role for name in names]
    assert len(names) == 59_870
    assert roles.count(Role.ROUTED_EXPERT) == 76 * 256 * 3
    assert roles.count(Role.INDEXER) == 79 * 5
    assert roles.count(Role.MTP) == 4


def test_an_expert_is_parsed_into_its_parts():
    parsed = parse("model.layers.12.mlp.experts.255.down_proj.weight_scale_2")
    assert (parsed.role, parsed.layer, parsed.expert) == (Role.ROUTED_EXPERT, 12, 255)
    assert (parsed.projection, parsed.part) == ("down_proj", "weight_scale_2")
    assert expert_name(12, 255, "down_proj", "weight_scale_2") == (
        "model.layers.12.mlp.experts.255.down_proj.weight_scale_2"
    )


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.mlp.experts.1.gate_proj.bias",
        "model.layers.x.mlp.gate.weight",
        "model.layers.0.mlp.experts.1.gate_proj.weight.extra",
        "transformer.wte.weight",
    ],
)
def test_an_unknown_name_is_an_error(name: str):
    assert find(name) is None
    with pytest.raises(CheckpointError, match="not in fourge's name table"):
        parse(name)


def test_fused_experts_become_byte_ranges():
    prefix = "model.layers.3.mlp.experts."
    fused = {
        prefix + "gate_up_proj": TensorInfo(
            prefix + "gate_up_proj", "BF16", (2, 6, 4), "s", 100, 2 * 6 * 4 * 2
        ),
        prefix + "down_proj": TensorInfo(
            prefix + "down_proj", "BF16", (2, 4, 3), "s", 1000, 2 * 4 * 3 * 2
        ),
    }
    parts = split_fused(fused)
    assert len(parts) == 6
    assert parts[prefix + "0.gate_proj.weight"][2:] == ((3, 4), "s", 100, 24)
    assert parts[prefix + "0.up_proj.weight"].start == 124
    assert parts[prefix + "1.gate_proj.weight"].start == 148
    assert parts[prefix + "1.down_proj.weight"][2:] == ((4, 3), "s", 1024, 24)


def test_an_expert_stored_twice_is_an_error():
    prefix = "model.layers.3.mlp.experts."
    tensors = {
        name: TensorInfo(name, "BF16", shape, "s", 0, 48)
        for name, shape in (
            (prefix + "down_proj", (2, 4, 3)),
            (prefix + "1.down_proj.weight", (4, 3)),
        )
    }
    with pytest.raises(CheckpointError, match="stored twice"):
        split_fused(tensors)


def test_fused_experts_of_another_form_are_an_error():
    name = "model.layers.3.mlp.experts.gate_up_proj"
    with pytest.raises(CheckpointError, match=r"shape \[6, 4\]"):
        split_fused({name: TensorInfo(name, "BF16", (6, 4), "s", 0, 48)})
