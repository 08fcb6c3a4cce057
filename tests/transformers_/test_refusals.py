"""What is not read is refused in one sentence before any weight is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.distributed import DistributedConfig

from checkpoint_edits import Folder, expert
from fourge.errors import CheckpointError, ConfigError, FourgeError
from fourge.transformers import ModelOptConfig

Load = Callable[..., Any]
SCALE = expert(1, 2, "down_proj.weight_scale")
ATTENTION = "model.layers.1.self_attn.o_proj.weight"


def other_architecture(own: Folder) -> None:
    llama = transformers.LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    block = own.read("config.json")["quantization_config"]
    own.write("config.json", llama.to_dict() | {"quantization_config": block})


def as_fp8(own: Folder) -> None:
    own.put({expert(1, 0, "gate_proj.weight"): torch.zeros(32, 64).to(torch.float8_e4m3fn)})


def unquantized(own: Folder) -> None:
    own.drop("weight_scale", "input_scale")
    names = [name for name in own.names("_proj.weight") if ".experts." in name]
    own.put(
        {
            name: torch.zeros(64, 32) if "down" in name else torch.zeros(32, 64)
            for name in names
            if "layers.3" not in name
        }
    )
    own.map(".experts.", lambda weight: weight.bfloat16())


def truncated(own: Folder) -> None:
    path = own.path / own.shard_of(SCALE)
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES: dict[str, tuple[Callable[[Folder], None], type[FourgeError], str]] = {
    "another algorithm": (
        lambda own: own.flat(quant_algo="FP8"),
        ConfigError,
        r"quant_algo 'FP8' .*NVFP4 and W4A16_NVFP4.*: serve",
    ),
    "no algorithm": (lambda own: own.flat(quant_algo=None), ConfigError, "quant_algo None"),
    "another block size": (lambda own: own.flat(group_size=32), ConfigError, "group_size 32"),
    "another architecture": (other_architecture, ConfigError, "model_type 'llama'; fourge knows"),
    "FP8 experts": (as_fp8, CheckpointError, r"experts\.0\.gate_proj\.weight is F8_E4M3"),
    "quantized attention": (
        lambda own: own.put(own.pack(ATTENTION)),
        CheckpointError,
        r"o_proj\.weight is U8; .* routed experts alone",
    ),
    "nothing quantized": (unquantized, CheckpointError, "no routed expert of the checkpoint"),
    "no block scales": (
        lambda own: own.drop(SCALE),
        CheckpointError,
        r"down_proj\.weight_scale should be F8_E4M3 \[64, 2\], found is nothing",
    ),
    "a misshapen scale": (
        lambda own: own.map(f"{SCALE}_2", lambda scale: scale.repeat(2)),
        CheckpointError,
        r"weight_scale_2 should be F32 \[\], found is F32 \[2\]",
    ),
    "a missing tensor": (lambda own: own.drop(ATTENTION), CheckpointError, "1 tensors .* missing"),
    "a truncated file": (truncated, CheckpointError, "truncated"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_is_not_read_is_refused(damage: str, own: Folder, load: Load):
    edit, kind, message = DAMAGES[damage]
    edit(own)
    with pytest.raises(kind, match=message):
        load(own.path)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_hf_quant_config_that_is_no_object_is_refused(text: str, own: Folder):
    (own.path / "hf_quant_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"hf_quant_config\.json cannot be read as a JSON object"):
        ModelOptConfig.from_pretrained(own.path)


def test_a_missing_hf_quant_config_is_named(own: Folder):
    (own.path / "hf_quant_config.json").unlink()
    with pytest.raises(OSError, match=r"file named hf_quant_config\.json"):
        ModelOptConfig.from_pretrained(own.path)


def test_other_dtypes_are_refused(checkpoint: Path, load: Load):
    with pytest.raises(ConfigError, match=r"torch\.float64; .*: choose one of them"):
        load(checkpoint, dtype=torch.float64)


def test_more_layers_than_there_are_are_refused(checkpoint_of: Callable[..., Path], load: Load):
    with pytest.raises(ConfigError, match=r"with 5 layers; its checkpoint has 3"):
        load(checkpoint_of("deepseek_v3"), num_hidden_layers=5)


def test_weights_in_memory_are_refused(checkpoint: Path):
    config = transformers.AutoConfig.from_pretrained(str(checkpoint))
    with pytest.raises(CheckpointError, match="given as a state_dict"):
        transformers.GlmMoeDsaForCausalLM.from_pretrained(None, config=config, state_dict={})


def test_tensor_parallelism_is_refused(checkpoint: Path, load: Load):
    config = transformers.AutoConfig.from_pretrained(str(checkpoint))
    config.distributed_config = DistributedConfig(tp_size=2)
    with pytest.raises(ConfigError, match=r"distributed model .*by one process"):
        load(checkpoint, config=config)


def test_saving_is_refused_and_writes_nothing(checkpoint: Path, load: Load, tmp_path: Path):
    with pytest.raises(ValueError, match="not serializable"):
        load(checkpoint).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
