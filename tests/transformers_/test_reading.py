"""Every form in which ModelOpt, NVIDIA and others publish a checkpoint gives the same model."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import fourge.transformers as subject
from checkpoint_edits import Folder, expert

Load = Callable[..., Any]
Tokens = Callable[..., torch.Tensor]
LENGTH = 40
TOLERANCE = 5e-5
WEIGHTS = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
# As nvidia-modelopt 0.47 writes config.json; the nested form is that of hf_quant_config.json.
MODELOPT: dict[str, Any] = {
    "config_groups": {
        "group_0": {"input_activations": WEIGHTS, "weights": WEIGHTS, "targets": ["Linear"]}
    },
    "ignore": ["lm_head", "model.layers.0*", "model.layers.1.self_attn*"],
    "quant_algo": "NVFP4",
    "producer": {"name": "modelopt", "version": "0.47.0"},
    "quant_method": "modelopt",
}
BLOCKS: dict[str, dict[str, Any]] = {
    "flat": MODELOPT,
    "modelopt_fp4": MODELOPT | {"quant_method": "modelopt_fp4"},
    "weight-only": MODELOPT | {"quant_algo": "W4A16_NVFP4"},
    "with an FP8 cache": MODELOPT
    | {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}},
    "nested": {
        "quant_method": "modelopt",
        "producer": {"name": "modelopt", "version": "0.29.0"},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": ["lm_head"],
        },
    },
}


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits[0]


def test_nothing_is_missing_and_nothing_is_reported(any_checkpoint: Path, load: Load):
    """MTP layers and input scales, which the model has no place for, included."""
    _, report = load(any_checkpoint, output_loading_info=True)
    assert not any(report.values()), report


@pytest.mark.parametrize("form", BLOCKS)
def test_every_form_of_the_block_is_read(
    form: str, checkpoint: Path, own: Folder, load: Load, tokens: Tokens
):
    own.config(quantization_config=BLOCKS[form])
    model, ids = load(own.path), tokens(LENGTH)
    assert torch.equal(logits(model, ids), logits(load(checkpoint), ids))
    written = model.config.to_dict()["quantization_config"]
    assert written == BLOCKS[form]
    assert json.loads(model.config.to_json_string())["quantization_config"] == BLOCKS[form]


def test_a_block_in_hf_quant_config_alone_is_given_by_hand(
    checkpoint: Path, own: Folder, load: Load, tokens: Tokens
):
    own.config(quantization_config=None)
    block = subject.ModelOptConfig.from_pretrained(own.path)
    model, ids = load(own.path, quantization_config=block), tokens(LENGTH)
    assert model.hf_quantizer.pre_quantized  # else loading waits for what is to be quantized
    assert torch.equal(logits(model, ids), logits(load(checkpoint), ids))


def test_gate_and_up_may_have_scales_of_their_own(
    own: Folder,
    load: Load,
    tokens: Tokens,
    expand: Callable[[Path, Path], Path],
    tmp_path: Path,
):
    before = load(own.path)
    own.map("up_proj.weight_scale_2", lambda scale: scale * 1.5)
    own.map("down_proj.weight_scale_2", lambda scale: scale.reshape(1))
    model, ids = load(own.path), tokens(LENGTH)
    expected = logits(load(expand(own.path, tmp_path / "expanded")), ids)
    assert (logits(model, ids) - expected).abs().max() < TOLERANCE
    assert (logits(before, ids) - expected).abs().max() > 100 * TOLERANCE


def test_a_projection_left_in_bf16_is_read_as_it_is(
    own: Folder,
    load: Load,
    tokens: Tokens,
    expand: Callable[[Path, Path], Path],
    tmp_path: Path,
):
    name = expert(1, 2, "down_proj.weight")
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    own.drop(f"{name}_scale", expert(1, 2, "down_proj.input_scale"))
    own.put({name: weight})
    model, ids = load(own.path), tokens(LENGTH)
    expected = logits(load(expand(own.path, tmp_path / "expanded")), ids)
    assert (logits(model, ids) - expected).abs().max() < TOLERANCE
    assert torch.equal(model.get_parameter(name), weight.float())


def test_scales_of_an_fp8_cache_are_passed_over(own: Folder, load: Load):
    for name in ("self_attn.k_scale", "self_attn.v_scale", "self_attn.kv_b_proj.k_scale"):
        own.put({f"model.layers.1.{name}": torch.tensor(1.0)})
    _, report = load(own.path, output_loading_info=True)
    assert not any(report.values()), report


def test_input_scales_need_not_be_there(checkpoint: Path, own: Folder, load: Load, tokens: Tokens):
    own.drop("input_scale")
    ids = tokens(LENGTH)
    assert torch.equal(logits(load(own.path), ids), logits(load(checkpoint), ids))


def test_one_file_without_an_index_is_read(
    checkpoint: Path, load: Load, tokens: Tokens, tmp_path: Path
):
    tensors = {}
    for path in checkpoint.glob("*.safetensors"):
        tensors |= load_file(path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(checkpoint / "config.json", tmp_path)
    ids = tokens(LENGTH)
    assert torch.equal(logits(load(tmp_path), ids), logits(load(checkpoint), ids))


def test_the_model_without_a_head_is_read(checkpoint: Path, load: Load, tokens: Tokens):
    bare = transformers.AutoModel.from_pretrained(str(checkpoint), dtype=torch.bfloat16)
    model, ids = load(checkpoint, dtype=torch.bfloat16), tokens(LENGTH)
    hidden = bare(input_ids=ids, use_cache=False).last_hidden_state[0]
    assert torch.equal(model.lm_head(hidden), logits(model, ids))


def test_fewer_layers_may_be_asked_for(checkpoint: Path, load: Load):
    model = load(checkpoint, num_hidden_layers=2)
    assert len(model.model.layers) == 2
    packed = [module for module in model.modules() if isinstance(module, subject.PackedLinear)]
    assert len(packed) == 6 * 3


def test_importing_again_registers_again(checkpoint: Path, load: Load, tokens: Tokens):
    before, ids = load(checkpoint), tokens(LENGTH)
    importlib.reload(subject)
    for method in ("modelopt", "modelopt_fp4"):
        assert AUTO_QUANTIZATION_CONFIG_MAPPING[method] is subject.ModelOptConfig
        assert AUTO_QUANTIZER_MAPPING[method] is subject.ModelOptQuantizer
    assert torch.equal(logits(load(checkpoint), ids), logits(before, ids))
