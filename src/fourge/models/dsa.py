"""DeepSeek sparse attention: the indexer that chooses which positions a query attends to.

    qi = cq Wq_b            rope on the first R numbers of each of the H heads
    ki = layer_norm(x Wk)   rope on the first R numbers; one key for all heads; eps 1e-6 everywhere
    I[t, s] = sum_h w[t, h] relu(qi[t, h] . ki[s]),   w = x Wproj,   for s <= t
    selected(t) = the min(index_topk, t + 1) largest of I[t, :]

Scores are float32, as in transformers 5.23, without what does not change their order: the scales
H^-0.5 and I^-0.5, DeepSeek's Hadamard rotation (its FP8 rounding is a serving matter). They exist
for one chunk of queries; a sequence's selection is int32 [L, index_topk], padded with -1.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from fourge.models import chunks
from fourge.models.config import ModelConfig
from fourge.models.linear import linear
from fourge.models.norm import layer_norm
from fourge.models.rope import RopeTable, rotate

# L tokens of the sequence, D hidden, Q query latent, H index heads, I index head size,
# R rotated numbers, N tokens of a chunk, S keys up to the chunk's last, K index_topk

_KEY_NORM_EPS = 1e-6


class IndexInput(NamedTuple):
    """The indexer's view of a sequence's tokens, float32."""

    key_LI: torch.Tensor  # normed, rotated
    weight_LH: torch.Tensor  # of each head


def project(
    x_ND: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    rope: RopeTable,
) -> IndexInput:
    """Keys and head weights of x_ND, the layer's normed input; ``rope`` holds its N positions."""
    key_NI = layer_norm(
        linear(x_ND, weights["self_attn.indexer.wk.weight"]),
        weights["self_attn.indexer.k_norm.weight"],
        weights["self_attn.indexer.k_norm.bias"],
        _KEY_NORM_EPS,
    )
    weight_NH = linear(x_ND.float(), weights["self_attn.indexer.weights_proj.weight"])
    return IndexInput(_rotate_front(key_NI, config, rope).float(), weight_NH)


def select(
    query_LQ: torch.Tensor,
    index: IndexInput,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    rope: RopeTable,
) -> torch.Tensor:
    """The positions that each token attends to, int32 [L, index_topk], -1 where there are fewer."""
    length, num_selected = len(query_LQ), config.index_topk
    device = query_LQ.device
    topk_LK = torch.full((length, num_selected), -1, dtype=torch.int32, device=device)
    for rows in chunks.slices(length, chunks.index_queries(length)):
        if rows.stop <= num_selected:
            earlier_NS = selection_mask(None, rows, device=device)
            position_S = torch.arange(rows.stop, dtype=torch.int32, device=device)
            topk_LK[rows, : rows.stop] = torch.where(earlier_NS, position_S, -1)
            continue
        query_NHI = linear(query_LQ[rows], weights["self_attn.indexer.wq_b.weight"])
        query_NHI = query_NHI.unflatten(-1, (config.index_n_heads, config.index_head_dim))
        query_NHI = _rotate_front(query_NHI, config, rope.rows(rows)).float()
        score_NS = _scores(query_NHI, index.key_LI[: rows.stop], index.weight_LH[rows])
        later_NN = torch.ones(len(score_NS), len(score_NS), dtype=torch.bool, device=device)
        score_NS[:, rows.start :].masked_fill_(later_NN.triu_(1), -torch.inf)
        best = score_NS.topk(num_selected, dim=-1, sorted=False)
        topk_LK[rows] = best.indices.masked_fill(best.values == -torch.inf, -1).int()
    return topk_LK


def selection_mask(
    topk_LK: torch.Tensor | None, rows: slice, *, device: torch.device
) -> torch.Tensor:
    """Bool [len(rows), rows.stop], True where the queries ``rows`` of a sequence look: at the
    positions in ``topk_LK``, or at all positions up to their own (None).
    """
    num_rows, num_keys = rows.stop - rows.start, rows.stop
    if topk_LK is None:
        causal = torch.ones(num_rows, num_keys, dtype=torch.bool, device=device)
        return causal.tril_(rows.start)
    chosen_NK = topk_LK[rows].long()
    # One column more than there are keys takes the padding.
    mask_NS = torch.zeros(num_rows, num_keys + 1, dtype=torch.bool, device=device)
    mask_NS.scatter_(1, chosen_NK.masked_fill(chosen_NK < 0, num_keys), True)
    return mask_NS[:, :num_keys]


def _rotate_front(x: torch.Tensor, config: ModelConfig, rope: RopeTable) -> torch.Tensor:
    turned = rotate(
        x[..., : config.qk_rope_head_dim], rope, interleave=config.indexer_rope_interleave
    )
    return torch.cat([turned, x[..., config.qk_rope_head_dim :]], -1)


def _scores(query_NHI: torch.Tensor, key_SI: torch.Tensor, weight_NH: torch.Tensor) -> torch.Tensor:
    """sum_h w_h relu(q_h . k), float32 [N, S], one head at a time in ascending order."""
    score_NS = query_NHI.new_zeros(len(query_NHI), len(key_SI))
    head_NS = torch.empty_like(score_NS)
    for head in range(query_NHI.shape[1]):
        torch.mm(query_NHI[:, head], key_SI.T, out=head_NS)
        score_NS.addcmul_(head_NS.relu_(), weight_NH[:, head, None])
    return score_NS
