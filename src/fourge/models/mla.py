"""Multi-head latent attention, naive and absorbed, in bounded pieces.

    cq = rms(x Wq_a)           q_h = [cq Wq_b,h | rope of its last R]     (no q_lora: q_h = x Wq,h)
    [c | kr] = x Wkv_a         c = rms(c), kr = rope(kr), one kr for all heads, not normed
    [kn_h | v_h] = c Wkv_b,h   k_h = [kn_h | kr]
    out = sum_h softmax(s q_h k_h^T + mask) v_h Wo,h^T,   s = qk_head_dim^-0.5 (yarn: * mscale^2)
    absorbed: Wkv_b,h = [Wuk_h | Wuv_h], and with x_h = [kn part of q_h Wuk_h | rope part of q_h]
    out = sum_h (softmax(s x_h [c | kr]^T + mask) c) Wuv_h^T Wo,h^T

Naive, keys and values exist for a group of heads at a time, scores for a group and a chunk of
queries; it suits many queries. Absorbed, the latents are keys and values of all heads; it suits few
queries that look at a cache.
Both latent norms use config.rms_norm_eps, as vllm 0.33 and sglang 0.5.23 do (transformers 5.23
builds them with 1e-6). Knows no selection rule: ``topk`` comes from dsa.py.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fourge.models import chunks
from fourge.models.config import ModelConfig
from fourge.models.dsa import causal_mask, selection_mask
from fourge.models.linear import linear
from fourge.models.norm import rms_norm
from fourge.models.rope import RopeTable, rotate, softmax_factor

# M sequences, L tokens of each, D hidden, Q query latent, C key-value latent, R rotated numbers,
# N tokens of a chunk, G heads of a group, K query/key size, V value size


class Latents(NamedTuple):
    """What attention keeps of the tokens of M sequences of length L, in the compute dtype. Queries
    may be fewer: they are then those of the last tokens.
    """

    query_MLQ: torch.Tensor  # normed query latent; the layer's normed input without q_lora
    latent_MLC: torch.Tensor  # normed
    rope_key_MLR: torch.Tensor  # rotated


def project(
    x_MND: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    rope: RopeTable,
) -> Latents:
    """Latents of x_MND, the layer's normed input; ``rope`` holds the rows of these N positions."""
    query_MNQ = x_MND
    if config.q_lora_rank is not None:
        query_MNQ = rms_norm(
            linear(x_MND, weights["self_attn.q_a_proj.weight"]),
            weights["self_attn.q_a_layernorm.weight"],
            config.rms_norm_eps,
        )
    joint = linear(x_MND, weights["self_attn.kv_a_proj_with_mqa.weight"])
    latent_MNC, rope_key_MNR = joint.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
    return Latents(
        query_MNQ,
        rms_norm(latent_MNC, weights["self_attn.kv_a_layernorm.weight"], config.rms_norm_eps),
        rotate(rope_key_MNR, rope, interleave=config.rope_interleave),
    )


def attend_naive(
    latents: Latents,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    rope: RopeTable,
    topk_MLK: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of each query over the positions in ``topk_MLK`` (None: all). Returns
    float32 [M, L, D], the output projection included.
    """
    count, length = latents.query_MLQ.shape[:2]
    group = chunks.head_group(config, count * latents.latent_MLC.shape[1])
    out_weight = weights["self_attn.o_proj.weight"]
    out_MLD = torch.zeros(
        count, length, config.hidden_size, dtype=torch.float32, device=out_weight.device
    )
    for first in range(0, config.num_attention_heads, group):
        heads = range(first, min(first + group, config.num_attention_heads))
        query_MGLK = _queries(latents, weights, config, rope, heads)
        key_MGLK, value_MGLV = _keys_values(latents, weights, config, heads)
        attended_MGLV = _attend_heads(query_MGLK, key_MGLK, value_MGLV, config, topk_MLK)
        columns = slice(heads.start * config.v_head_dim, heads.stop * config.v_head_dim)
        attended_MLX = attended_MGLV.transpose(1, 2).flatten(2)
        for rows in chunks.slices(length, chunks.run_rows(count)):
            out_MLD[:, rows] += linear(attended_MLX[:, rows], out_weight[:, columns])
    return out_MLD


def attend_absorbed(
    query_TQ: torch.Tensor,
    key_MSX: torch.Tensor,
    seen_MNS: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    rope: RopeTable,
) -> torch.Tensor:
    """Attention of T = M * N queries, N of each row of ``key_MSX`` = [c | kr], over the positions
    that are True in ``seen_MNS``. ``rope`` holds the queries' T positions. Computes in the keys'
    dtype, the softmax in float32; returns [T, D] in the queries' dtype.
    """
    query_THX = absorb(query_TQ, weights, config, rope, key_MSX.dtype)
    mixed_THC = mix(query_THX, key_MSX, seen_MNS, softmax_scale(config), config.kv_lora_rank)
    return project_out(mixed_THC, weights, config, query_TQ.dtype)


def absorb(
    query_TQ: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    rope: RopeTable,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Queries x_h [T, H, X] in ``dtype``; ``rope`` holds their T positions."""
    num_heads, nope = config.num_attention_heads, config.qk_nope_head_dim
    name = "q_proj" if config.q_lora_rank is None else "q_b_proj"
    query_THK = linear(query_TQ, weights[f"self_attn.{name}.weight"])
    query_THK = query_THK.unflatten(-1, (num_heads, config.qk_head_dim)).to(dtype)
    joint_HOC = _joint(weights, config, dtype)
    absorbed_HTC = torch.bmm(query_THK[..., :nope].transpose(0, 1), joint_HOC[:, :nope])
    rotated_THR = rotate(query_THK[..., nope:], rope.for_heads(), interleave=config.rope_interleave)
    return torch.cat([absorbed_HTC.transpose(0, 1), rotated_THR], -1)


def mix(
    query_THX: torch.Tensor, key_MSX: torch.Tensor, seen_MNS: torch.Tensor, scale: float,
    latent: int,
) -> torch.Tensor:  # fmt: skip
    """softmax(scale x_h [c | kr]^T) c of absorbed queries: [T, H, C] with C = ``latent``."""
    count, per_row = seen_MNS.shape[:2]
    num_heads = query_THX.shape[1]
    query_MAX = query_THX.view(count, per_row * num_heads, -1)
    score_MAS = torch.bmm(query_MAX, key_MSX.mT).float().mul_(scale)
    score_MNHS = score_MAS.view(count, per_row, num_heads, -1)
    score_MNHS.masked_fill_(~seen_MNS.unsqueeze(2), -torch.inf)
    share_MAS = score_MNHS.softmax(-1).to(key_MSX.dtype).view_as(score_MAS)
    # A share of 0 of a NaN would be one, and what a query does not see may be another's; of what it
    # sees, its shares are NaN already.
    mixed_MAC = torch.bmm(share_MAS, key_MSX[..., :latent].nan_to_num(nan=0.0))
    return mixed_MAC.view(count * per_row, num_heads, -1)


def project_out(
    mixed_THC: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Attention output [T, D] in ``dtype`` of what absorbed heads have mixed."""
    joint_HOC = _joint(weights, config, mixed_THC.dtype)
    out_HTV = torch.bmm(mixed_THC.transpose(0, 1), joint_HOC[:, config.qk_nope_head_dim :].mT)
    out_TX = out_HTV.transpose(0, 1).flatten(1).to(dtype)
    return linear(out_TX, weights["self_attn.o_proj.weight"])


def softmax_scale(config: ModelConfig) -> float:
    """s, what scores are multiplied by."""
    return config.qk_head_dim**-0.5 * softmax_factor(config.rope)


def _joint(
    weights: Mapping[str, torch.Tensor], config: ModelConfig, dtype: torch.dtype
) -> torch.Tensor:
    """[Wuk_h | Wuv_h], [H, key and value rows, C]."""
    joint_AC = weights["self_attn.kv_b_proj.weight"]
    return joint_AC.unflatten(0, (config.num_attention_heads, -1)).to(dtype)


def _attend_heads(
    query_MGLK: torch.Tensor,
    key_MGLK: torch.Tensor,
    value_MGLV: torch.Tensor,
    config: ModelConfig,
    topk_MLK: torch.Tensor | None,
) -> torch.Tensor:
    """Attended values [M, G, L, V] of a group of heads, one chunk of queries at a time."""
    count, heads, length = query_MGLK.shape[:3]
    total, width = value_MGLV.shape[2:]
    scale = softmax_scale(config)
    attended_MGLV = value_MGLV.new_empty(count, length, heads, width).transpose(1, 2)
    value_MGLK = _widen(value_MGLV, query_MGLK.shape[-1])
    for rows in chunks.slices(length, chunks.attention_queries(config, count, total)):
        places = slice(total - length + rows.start, total - length + rows.stop)
        mask = None
        if topk_MLK is not None:
            mask = selection_mask(topk_MLK[:, rows], places.stop).unsqueeze(1)
        elif places.start > 0:
            mask = causal_mask(places, device=key_MGLK.device)
        attended_MGNK = F.scaled_dot_product_attention(
            query_MGLK[:, :, rows],
            key_MGLK[:, :, : places.stop],
            value_MGLK[:, :, : places.stop],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
        )
        attended_MGLV[:, :, rows] = attended_MGNK[..., :width]
    return attended_MGLV


def _queries(
    latents: Latents,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    rope: RopeTable,
    heads: range,
) -> torch.Tensor:
    """Queries [M, G, L, K] of ``heads``, their last R numbers rotated."""
    name = "q_proj" if config.q_lora_rank is None else "q_b_proj"
    rows = slice(heads.start * config.qk_head_dim, heads.stop * config.qk_head_dim)
    query_MLGK = linear(latents.query_MLQ, weights[f"self_attn.{name}.weight"][rows])
    query_MLGK = query_MLGK.unflatten(-1, (len(heads), config.qk_head_dim))
    rotated = query_MLGK[..., config.qk_nope_head_dim :]
    total = latents.latent_MLC.shape[1]
    table = rope.rows(slice(total - query_MLGK.shape[1], total)).for_heads()
    rotated.copy_(rotate(rotated, table, interleave=config.rope_interleave))
    return query_MLGK.transpose(1, 2)


def _keys_values(
    latents: Latents, weights: Mapping[str, torch.Tensor], config: ModelConfig, heads: range
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [M, G, L, K] and values [M, G, L, V] of ``heads``."""
    nope, per_head = config.qk_nope_head_dim, config.qk_nope_head_dim + config.v_head_dim
    rows = slice(heads.start * per_head, heads.stop * per_head)
    joint_MGLX = (
        linear(latents.latent_MLC, weights["self_attn.kv_b_proj.weight"][rows])
        .unflatten(-1, (len(heads), per_head))
        .transpose(1, 2)
    )
    key_MGLK = joint_MGLX.new_empty(*joint_MGLX.shape[:-1], config.qk_head_dim)
    key_MGLK[..., :nope] = joint_MGLX[..., :nope]
    key_MGLK[..., nope:] = latents.rope_key_MLR.unsqueeze(1)
    return key_MGLK, joint_MGLX[..., nope:]


def _widen(value_MGSV: torch.Tensor, width: int) -> torch.Tensor:
    """Values padded with zeros to the width of the keys: torch's attention without a matrix of all
    scores wants heads of one width (torch 2.13, CPU and CUDA flash).
    """
    return F.pad(value_MGSV, (0, max(0, width - value_MGSV.shape[-1])))
