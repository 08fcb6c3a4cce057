"""Multi-head latent attention of one sequence, naive form, in pieces of bounded size.

    cq = rms(x Wq_a)           q_h = [cq Wq_b,h | rope of its last R]     (no q_lora: q_h = x Wq,h)
    [c | kr] = x Wkv_a         c = rms(c), kr = rope(kr), one kr for all heads, not normed
    [kn_h | v_h] = c Wkv_b,h   k_h = [kn_h | kr]
    out = sum_h softmax(s q_h k_h^T + mask) v_h Wo,h^T,   s = qk_head_dim^-0.5 (yarn: * mscale^2)

Keys and values exist for a group of heads at a time, scores for a group and a chunk of queries.
Both latent norms use config.rms_norm_eps, as vllm 0.33 and sglang 0.5.23 do (transformers 5.23
builds them with 1e-6). Knows no selection rule: ``topk`` comes from dsa.py.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fourge.models import chunks
from fourge.models.config import ModelConfig
from fourge.models.dsa import selection_mask
from fourge.models.linear import linear
from fourge.models.norm import rms_norm
from fourge.models.rope import RopeTable, rotate, softmax_factor

# L tokens of the sequence, D hidden, Q query latent, C key-value latent, R rotated numbers,
# N tokens of a chunk, G heads of a group, K query/key size, V value size


class Latents(NamedTuple):
    """What attention keeps of a sequence's tokens, in the compute dtype."""

    query_LQ: torch.Tensor  # normed query latent; the layer's normed input where there is no q_lora
    latent_LC: torch.Tensor  # normed
    rope_key_LR: torch.Tensor  # rotated


def project(
    x_ND: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    rope: RopeTable,
) -> Latents:
    """Latents of x_ND, the layer's normed input; ``rope`` holds the rows of these N positions."""
    query_NQ = x_ND
    if config.q_lora_rank is not None:
        query_NQ = rms_norm(
            linear(x_ND, weights["self_attn.q_a_proj.weight"]),
            weights["self_attn.q_a_layernorm.weight"],
            config.rms_norm_eps,
        )
    joint = linear(x_ND, weights["self_attn.kv_a_proj_with_mqa.weight"])
    latent_NC, rope_key_NR = joint.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
    return Latents(
        query_NQ,
        rms_norm(latent_NC, weights["self_attn.kv_a_layernorm.weight"], config.rms_norm_eps),
        rotate(rope_key_NR, rope, interleave=config.rope_interleave),
    )


def attend_naive(
    latents: Latents,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    rope: RopeTable,
    topk: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of one sequence over the positions in ``topk`` (None: all). Returns float32
    [L, D], the output projection included.
    """
    length = len(latents.latent_LC)
    group = chunks.head_group(config, length)
    out_weight = weights["self_attn.o_proj.weight"]
    out_LD = torch.zeros(
        length, config.hidden_size, dtype=torch.float32, device=latents.latent_LC.device
    )
    for first in range(0, config.num_attention_heads, group):
        heads = range(first, min(first + group, config.num_attention_heads))
        query_GLK = _queries(latents, weights, config, rope, heads)
        key_GLK, value_GLV = _keys_values(latents, weights, config, heads)
        attended_GLV = _attend_heads(query_GLK, key_GLK, value_GLV, config, topk)
        columns = slice(heads.start * config.v_head_dim, heads.stop * config.v_head_dim)
        attended_LX = attended_GLV.transpose(0, 1).flatten(1)
        for rows in chunks.slices(length, chunks.ROWS):
            out_LD[rows] += linear(attended_LX[rows], out_weight[:, columns])
    return out_LD


def _attend_heads(
    query_GLK: torch.Tensor,
    key_GLK: torch.Tensor,
    value_GLV: torch.Tensor,
    config: ModelConfig,
    topk: torch.Tensor | None,
) -> torch.Tensor:
    """Attended values [G, L, V] of a group of heads, one chunk of queries at a time."""
    length = query_GLK.shape[1]
    scale = config.qk_head_dim**-0.5 * softmax_factor(config.rope)
    attended_GLV = torch.empty_like(value_GLV)
    for rows in chunks.slices(length, chunks.attention_queries(config, length)):
        mask_NL = None
        if topk is not None or rows.start > 0:
            mask_NL = selection_mask(topk, rows, device=key_GLK.device)
        attended_GLV[:, rows] = F.scaled_dot_product_attention(
            query_GLK[None, :, rows],
            key_GLK[None, :, : rows.stop],
            value_GLV[None, :, : rows.stop],
            attn_mask=mask_NL,
            is_causal=mask_NL is None,
            scale=scale,
        )[0]
    return attended_GLV


def _queries(
    latents: Latents,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    rope: RopeTable,
    heads: range,
) -> torch.Tensor:
    """Queries [G, L, K] of ``heads``, their last R numbers rotated."""
    name = "q_proj" if config.q_lora_rank is None else "q_b_proj"
    rows = slice(heads.start * config.qk_head_dim, heads.stop * config.qk_head_dim)
    query_LGK = linear(latents.query_LQ, weights[f"self_attn.{name}.weight"][rows])
    query_LGK = query_LGK.unflatten(-1, (len(heads), config.qk_head_dim))
    rotated = query_LGK[..., config.qk_nope_head_dim :]
    table = rope.rows(slice(0, len(query_LGK)))
    rotated.copy_(rotate(rotated, table, interleave=config.rope_interleave))
    return query_LGK.transpose(0, 1)


def _keys_values(
    latents: Latents, weights: Mapping[str, torch.Tensor], config: ModelConfig, heads: range
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [G, L, K] and values [G, L, V] of ``heads``."""
    nope, per_head = config.qk_nope_head_dim, config.qk_nope_head_dim + config.v_head_dim
    rows = slice(heads.start * per_head, heads.stop * per_head)
    joint_GLX = (
        linear(latents.latent_LC, weights["self_attn.kv_b_proj.weight"][rows])
        .unflatten(-1, (len(heads), per_head))
        .transpose(0, 1)
    )
    key_GLK = joint_GLX.new_empty(*joint_GLX.shape[:-1], config.qk_head_dim)
    key_GLK[..., :nope] = joint_GLX[..., :nope]
    key_GLK[..., nope:] = latents.rope_key_LR
    return key_GLK, joint_GLX[..., nope:]
