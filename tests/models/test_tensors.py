"""What a config demands, compared with what a checkpoint has."""

from pathlib import Path

import pytest

from fourge.checkpoint.header import TensorInfo, read_checkpoint
from fourge.checkpoint.names import split_fused
from fourge.errors import CheckpointError
from fourge.models.config import from_dict
from fourge.models.tensors import check_tensors, expected_tensors, layer_shapes
from hollow_checkpoint import GLM_5_1
from random_checkpoint import FAMILIES, published_config, write_checkpoint

Tensors = dict[str, TensorInfo]


def test_glm_5_1_has_the_published_counts():
    config = from_dict(dict(GLM_5_1))
    assert [len(layer_shapes(config, layer)) for layer in (0, 3, 78)] == [17, 787, 791]
    assert len(expected_tensors(config)) == 59_870
    assert len(expected_tensors(config, mtp=False)) == 59_870 - 791


def test_glm_5_2_lacks_the_indexers_of_its_shared_layers():
    config = from_dict(GLM_5_1 | {"index_topk_freq": 4, "index_skip_topk_offset": 3})
    assert len(expected_tensors(config)) == 59_585


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tensors") / "model")


@pytest.fixture
def tensors(folder: Path) -> Tensors:
    return dict(read_checkpoint(folder).tensors)


CONFIG = from_dict(published_config())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fused", [False, True])
def test_checkpoints_of_every_family_pass(tmp_path: Path, family: str, fused: bool):
    raw = published_config(family)
    write_checkpoint(tmp_path / "model", config=raw, fused_experts=fused)
    found = split_fused(read_checkpoint(tmp_path / "model").tensors)
    check_tensors(found, from_dict(raw), mtp=True)


def test_a_missing_tensor_is_named(tensors: Tensors):
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"1 tensors.*layers\.1\.mlp\.experts\.3"):
        check_tensors(tensors, CONFIG, mtp=True)


def test_a_missing_mtp_layer_is_told_with_the_way_out(tensors: Tensors):
    without = {name: info for name, info in tensors.items() if ".layers.3." not in name}
    with pytest.raises(CheckpointError, match=r"MTP layer is incomplete.*--mtp drop"):
        check_tensors(without, CONFIG, mtp=True)
    check_tensors(without, CONFIG, mtp=False)


def test_a_layer_beyond_the_config_is_named(tensors: Tensors):
    name = "model.layers.4.input_layernorm.weight"
    tensors[name] = TensorInfo(name, "BF16", (64,), "s", 0, 128)
    with pytest.raises(CheckpointError, match="belongs to layer 4, but"):
        check_tensors(tensors, CONFIG, mtp=True)


def test_a_wrong_shape_is_named(tensors: Tensors):
    name = "model.layers.1.mlp.gate.weight"
    tensors[name] = tensors[name]._replace(shape=(7, 64))
    with pytest.raises(CheckpointError, match=r"shape \[7, 64\].*demands \[6, 64\]"):
        check_tensors(tensors, CONFIG, mtp=True)


@pytest.mark.parametrize(
    ("name", "dtype", "hint"),
    [
        ("model.layers.1.mlp.experts.0.up_proj.weight", "F8_E4M3", "quantized twice"),
        ("model.layers.1.mlp.experts.0.up_proj.weight", "F32", "convert the checkpoint to BF16"),
        ("model.layers.1.mlp.experts.0.up_proj.weight", "F16", "convert the checkpoint to BF16"),
        ("lm_head.weight", "F8_E4M3", "quantized twice"),
    ],
)
def test_a_dtype_that_is_not_bf16_is_refused(tensors: Tensors, name: str, dtype: str, hint: str):
    tensors[name] = tensors[name]._replace(dtype=dtype)
    with pytest.raises(CheckpointError, match=f"{name} is {dtype}; needed is BF16: .*{hint}"):
        check_tensors(tensors, CONFIG, mtp=True)


def test_the_correction_bias_may_be_float32(tensors: Tensors):
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == "F32"
    check_tensors(tensors, CONFIG, mtp=True)
