"""Random BF16 checkpoints in published form, for tests and benchmarks; needs numpy only.

The bytes of a tensor depend on (seed, name, shape) alone: not on shards or fusing, and not on the
versions of torch and numpy. One expert's matrix is held at a time, so that a checkpoint of many
gigabytes can be written. random_values.py says which traps every sparse layer holds.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from random_values import Part, part_bytes

Config = dict[str, Any]

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 1,
    "routed_scaling_factor": 2.5,
    "n_group": 1,
    "topk_group": 1,
}
INDEXER = {"index_topk": 32, "index_n_heads": 4, "index_head_dim": 16}
FAMILIES: dict[str, Config] = {
    "glm_moe_dsa": {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "rope_interleave": True,
        "indexer_rope_interleave": True,
        **INDEXER,
    },
    "glm4_moe_lite": {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "rope_interleave": True,
        "routed_scaling_factor": 1.8,
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
    },
    "deepseek_v32": {
        "architectures": ["DeepseekV32ForCausalLM"],
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        **INDEXER,
    },
}
FIXED = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "eos_token_id": [0, 1, 2],
    "ep_size": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "transformers_version": "5.4.0",
    "use_cache": True,
}
OWN_MTP_EMBEDDING = (
    "deepseek_v3",
    "deepseek_v32",
)  # these store the MTP layer's embedding and head


class Tensor(NamedTuple):
    """A tensor of the file: its parts lie one after the other."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # "BF16" or "F32"
    parts: tuple[Part, ...]


def published_config(family: str = "glm_moe_dsa", **changes: Any) -> Config:
    """A config.json as published, tiny unless `changes` say otherwise (a family above)"""
    config = {"model_type": family, **FIXED, **SIZES, **FAMILIES[family], **changes}
    config["qk_head_dim"] = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    if family.startswith("glm"):
        config["head_dim"] = config["qk_rope_head_dim"]
        config["mlp_layer_types"] = [
            "sparse" if is_sparse(config, layer) else "dense"
            for layer in range(config["num_hidden_layers"])
        ]
    return dict(sorted(config.items()))


def write_checkpoint(
    folder: Path,
    *,
    config: Config | None = None,
    seed: int = 0,
    num_shards: int | None = None,
    fused_experts: bool = False,
    traps: bool = True,
) -> Path:
    """Write config.json, the shards and their index into `folder` (made if absent); return it.

    num_shards None: one shard a layer. A number: every layer is spread over that many shards, and
    an expert's down_proj (from two shards on) lies in another shard than its gate_proj.
    fused_experts: mlp.experts.gate_up_proj [E, 2I, H] and mlp.experts.down_proj [E, H, I] with the
    same values as the per-expert tensors.
    """
    config = config or published_config()
    tensors = list_tensors(config, fused_experts)
    shards = _one_shard_a_layer(tensors) if num_shards is None else _deal(tensors, num_shards)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, shard, lambda part: part_bytes(part, seed, traps))
        weight_map.update({tensor.name: file for tensor in shard})
    total = sum(_num_bytes(tensor) for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def write_input_ids(path: Path, *, sequences: int, length: int, vocab: int, seed: int = 0) -> Path:
    """Write JSON lines {"input_ids": [...]} of `length` random tokens each; return `path`."""
    raw = np.random.PCG64(seed).random_raw(sequences * length) % vocab
    rows = raw.reshape(sequences, length).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


def checkpoint_sha256(config: Config, *, seed: int = 0, traps: bool = True) -> str:
    """The hash of every tensor's name and bytes, per-expert layout, without writing a file."""
    digest = hashlib.sha256()
    for tensor in list_tensors(config, fused_experts=False):
        digest.update(tensor.name.encode())
        for part in tensor.parts:
            digest.update(part_bytes(part, seed, traps))
    return digest.hexdigest()


def list_tensors(config: Config, fused_experts: bool) -> list[Tensor]:
    """Every tensor of the checkpoint, in the order of the layers, the MTP layers last."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    tensors = [_drawn("model.embed_tokens.weight", (vocab, hidden), std=1.0)]
    for layer in range(config["num_hidden_layers"] + config["num_nextn_predict_layers"]):
        tensors += _layer_tensors(config, layer, fused_experts)
    tensors.append(_norm("model.norm.weight", hidden))
    if not config["tie_word_embeddings"]:
        tensors.append(_linear("lm_head.weight", vocab, hidden))
    return tensors


def num_elements(tensor: Tensor) -> int:
    return math.prod(tensor.shape)


def is_sparse(config: Config, layer: int) -> bool:
    """Whether the layer has routed experts; an MTP layer always has."""
    types = config.get("mlp_layer_types")
    if types is None or layer >= config["num_hidden_layers"]:
        return layer >= config["first_k_dense_replace"]
    return types[layer] == "sparse"


def has_indexer(config: Config, layer: int) -> bool:
    """Whether the layer stores an indexer (DSA families: full layers and MTP layers)."""
    if "index_topk" not in config:
        return False
    if layer >= config["num_hidden_layers"]:
        return True
    if types := config.get("indexer_types"):
        return types[layer] == "full"
    if pattern := config.get("index_topk_pattern"):
        return pattern[layer] == "F"
    frequency, offset = config.get("index_topk_freq", 1), config.get("index_skip_topk_offset", 2)
    return max(layer - offset + 1, 0) % frequency == 0


# -- names and shapes ---------------------------------------------------------------------------


def _drawn(name: str, shape: tuple[int, ...], mean: float = 0.0, std: float = 0.1) -> Tensor:
    return Tensor(name, shape, "BF16", (Part(name, shape, mean, std),))


def _linear(name: str, num_out: int, num_in: int) -> Tensor:
    return _drawn(name, (num_out, num_in), std=num_in**-0.5)


def _norm(name: str, size: int) -> Tensor:
    return _drawn(name, (size,), mean=1.0)


def _layer_tensors(config: Config, layer: int, fused_experts: bool) -> list[Tensor]:
    prefix, hidden = f"model.layers.{layer}.", config["hidden_size"]
    tensors = [
        _norm(prefix + "input_layernorm.weight", hidden),
        *_attention_tensors(config, prefix + "self_attn."),
        _norm(prefix + "post_attention_layernorm.weight", hidden),
    ]
    if has_indexer(config, layer):
        tensors += _indexer_tensors(config, prefix + "self_attn.indexer.")
    if is_sparse(config, layer):
        tensors += _moe_tensors(config, prefix + "mlp.", fused_experts)
    else:
        tensors += _mlp_tensors(prefix + "mlp.", config["intermediate_size"], hidden)
    if layer >= config["num_hidden_layers"]:
        tensors += _mtp_tensors(config, prefix)
    return tensors


def _attention_tensors(config: Config, prefix: str) -> list[Tensor]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, value = (
        config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    if q_rank is None:
        query = [_linear(prefix + "q_proj.weight", heads * (nope + rope), hidden)]
    else:
        query = [
            _linear(prefix + "q_a_proj.weight", q_rank, hidden),
            _norm(prefix + "q_a_layernorm.weight", q_rank),
            _linear(prefix + "q_b_proj.weight", heads * (nope + rope), q_rank),
        ]
    return [
        *query,
        _linear(prefix + "kv_a_proj_with_mqa.weight", kv_rank + rope, hidden),
        _norm(prefix + "kv_a_layernorm.weight", kv_rank),
        _linear(prefix + "kv_b_proj.weight", heads * (nope + value), kv_rank),
        _linear(prefix + "o_proj.weight", hidden, heads * value),
    ]


def _indexer_tensors(config: Config, prefix: str) -> list[Tensor]:
    heads, size = config["index_n_heads"], config["index_head_dim"]
    return [
        _linear(prefix + "wq_b.weight", heads * size, config["q_lora_rank"]),
        _linear(prefix + "wk.weight", size, config["hidden_size"]),
        _norm(prefix + "k_norm.weight", size),
        _drawn(prefix + "k_norm.bias", (size,)),
        _linear(prefix + "weights_proj.weight", heads, config["hidden_size"]),
    ]


def _mlp_tensors(prefix: str, inner: int, hidden: int) -> list[Tensor]:
    return [
        _linear(prefix + "gate_proj.weight", inner, hidden),
        _linear(prefix + "up_proj.weight", inner, hidden),
        _linear(prefix + "down_proj.weight", hidden, inner),
    ]


def _moe_tensors(config: Config, prefix: str, fused_experts: bool) -> list[Tensor]:
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    num_experts = config["n_routed_experts"]
    bias = Part(prefix + "gate.e_score_correction_bias", (num_experts,), 12.0, 0.02)
    tensors = [
        _linear(prefix + "gate.weight", num_experts, hidden),
        Tensor(bias.name, bias.shape, "F32", (bias,)),
    ]
    experts = [_mlp_tensors(f"{prefix}experts.{e}.", inner, hidden) for e in range(num_experts)]
    if fused_experts:
        gate_up = tuple(part for gate, up, _ in experts for part in gate.parts + up.parts)
        down = tuple(part for _, _, down in experts for part in down.parts)
        shape, name = (num_experts, 2 * inner, hidden), prefix + "experts.gate_up_proj"
        tensors.append(Tensor(name, shape, "BF16", gate_up))
        shape, name = (num_experts, hidden, inner), prefix + "experts.down_proj"
        tensors.append(Tensor(name, shape, "BF16", down))
    else:
        tensors += [tensor for expert in experts for tensor in expert]
    if config["n_shared_experts"]:
        shared = inner * config["n_shared_experts"]
        tensors += _mlp_tensors(prefix + "shared_experts.", shared, hidden)
    return tensors


def _mtp_tensors(config: Config, prefix: str) -> list[Tensor]:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    tensors = [
        _norm(prefix + "enorm.weight", hidden),
        _norm(prefix + "hnorm.weight", hidden),
        _linear(prefix + "eh_proj.weight", hidden, 2 * hidden),
        _norm(prefix + "shared_head.norm.weight", hidden),
    ]
    if config["model_type"] in OWN_MTP_EMBEDDING:
        tensors.append(_drawn(prefix + "embed_tokens.weight", (vocab, hidden), std=1.0))
        tensors.append(_linear(prefix + "shared_head.head.weight", vocab, hidden))
    return tensors


# -- files --------------------------------------------------------------------------------------


def _layer_of(tensor: Tensor) -> int:
    words = tensor.name.split(".")
    return int(words[2]) if words[1] == "layers" else -1


def _one_shard_a_layer(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    shards: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        shards.setdefault(_layer_of(tensor), []).append(tensor)
    return list(shards.values())


def _deal(tensors: Sequence[Tensor], num_shards: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[] for _ in range(num_shards)]
    for position, tensor in enumerate(tensors):
        shards[_dealt_to(tensor, position) % num_shards].append(tensor)
    return shards


def _dealt_to(tensor: Tensor, position: int) -> int:
    if ".experts." not in tensor.name:
        return position
    words = tensor.name.split(".experts.")[1].split(".")
    offset = {"gate_proj": 0, "gate_up_proj": 0, "up_proj": 2, "down_proj": 1}
    return offset[words[-1]] if len(words) == 1 else int(words[0]) + offset[words[1]]


def _num_bytes(tensor: Tensor) -> int:
    return num_elements(tensor) * {"BF16": 2, "F32": 4}[tensor.dtype]


def _write_shard(path: Path, shard: Sequence[Tensor], draw: Callable[[Part], bytes]) -> None:
    """Write a safetensors file part by part; F32 first, since readers want it aligned."""
    shard = sorted(shard, key=lambda tensor: tensor.dtype, reverse=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        end = offset + _num_bytes(tensor)
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in _parts(shard):
            file.write(draw(part))


def _parts(shard: Sequence[Tensor]) -> Iterator[Part]:
    for tensor in shard:
        yield from tensor.parts
