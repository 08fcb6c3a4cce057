"""Checkpoints with real headers and hollow data: sparse files of the right size, nothing in them.

Enough for everything that reads headers only, at any scale: GLM-5.1's 1.5 TB take 10 MB of disk.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourge.checkpoint.header import INDEX_NAME
from fourge.checkpoint.metadata import exclude_list, quantization_config
from fourge.checkpoint.writer import OutTensor, plan_shard
from fourge.models.config import from_dict
from fourge.models.tensors import expected_tensors

# config.json of GLM-5.1 in its published form.
GLM_5_1: Mapping = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "eos_token_id": [154820, 154827, 154829],
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "index_head_dim": 128,
    "index_n_heads": 32,
    "index_topk": 2048,
    "indexer_rope_interleave": True,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "kv_lora_rank": 512,
    "max_position_embeddings": 202752,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75,
    "model_type": "glm_moe_dsa",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 78,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 154820,
    "pretraining_tp": 1,
    "q_lora_rank": 2048,
    "qk_head_dim": 256,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_interleave": True,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "use_cache": True,
    "v_head_dim": 256,
    "vocab_size": 154880,
}


def glm_5_1(num_layers: int) -> dict[str, Any]:
    """config.json of GLM-5.1 with so many layers, the first one dense, and no MTP layer."""
    return {
        **GLM_5_1,
        "num_hidden_layers": num_layers,
        "mlp_layer_types": ["dense"] + ["sparse"] * (num_layers - 1),
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
    }


def write_hollow_checkpoint(folder: Path, raw: Mapping, *, tensors_per_shard: int) -> None:
    """config.json, index and shards of the model that ``raw`` describes, all weights zero."""
    outs = [
        OutTensor(name, "F32" if name.endswith("e_score_correction_bias") else "BF16", shape)
        for name, shape in expected_tensors(from_dict(dict(raw))).items()
    ]
    _write(folder, raw, outs, tensors_per_shard)


def write_hollow_nvfp4(
    folder: Path, raw: Mapping, *, tensors_per_shard: int, mtp: str = "bf16"
) -> None:
    """The same with NVFP4 routed experts in ModelOpt form; ``mtp`` is "bf16", "nvfp4" or "drop"."""
    config = from_dict(dict(raw))
    mtp_layers = [str(layer) for layer in config.mtp_layers]
    outs: list[OutTensor] = []
    for name, shape in expected_tensors(config, mtp=mtp != "drop").items():
        is_mtp = name.split(".")[2:3] and name.split(".")[2] in mtp_layers
        if ".mlp.experts." in name and (mtp == "nvfp4" or not is_mtp):
            rows, columns = shape
            stem = name.removesuffix("weight")
            outs += [
                OutTensor(name, "U8", (rows, columns // 2)),
                OutTensor(f"{name}_scale", "F8_E4M3", (rows, columns // 16)),
                OutTensor(f"{name}_scale_2", "F32", ()),
                OutTensor(f"{stem}input_scale", "F32", ()),
            ]
        else:
            dtype = "F32" if name.endswith("e_score_correction_bias") else "BF16"
            outs.append(OutTensor(name, dtype, shape))
    excluded = exclude_list(range(3), config.mtp_layers)
    document = {**raw, "quantization_config": quantization_config(excluded)}
    if mtp == "drop":
        document["num_nextn_predict_layers"] = 0
    _write(folder, document, outs, tensors_per_shard)


def _write(folder: Path, raw: Mapping, outs: list[OutTensor], tensors_per_shard: int) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    pieces = [outs[i : i + tensors_per_shard] for i in range(0, len(outs), tensors_per_shard)]
    weight_map = {}
    for number, piece in enumerate(pieces, start=1):
        file = f"model-{number:05d}-of-{len(pieces):05d}.safetensors"
        plan = plan_shard(file, piece)
        with (folder / file).open("wb") as stream:
            stream.write(plan.header)
            stream.truncate(plan.nbytes)
        weight_map |= dict.fromkeys(plan.sizes, file)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
