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

# M sequences, L tokens of each, D hidden, Q query latent, H index heads, I index head size,
# R rotated numbers, N tokens of a chunk, S keys up to the chunk's last, K index_topk

_KEY_NORM_EPS = 1e-6


class IndexInput(NamedTuple):
    """The indexer's view of the tokens of M sequences, float32."""

    key_MLI: torch.Tensor  # normed, rotated
    weight_MLH: torch.Tensor  # of each head


def project(
    x_MND: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    rope: RopeTable,
) -> IndexInput:
    """Keys and head weights of x_MND, the layer's normed input; ``rope`` holds its N positions."""
    key_MNI = layer_norm(
        linear(x_MND, weights["self_attn.indexer.wk.weight"]),
        weights["self_attn.indexer.k_norm.weight"],
        weights["self_attn.indexer.k_norm.bias"],
        _KEY_NORM_EPS,
    )
    weight_MNH = linear(x_MND.float(), weights["self_attn.indexer.weights_proj.weight"])
    return IndexInput(_rotate_front(key_MNI, config, rope).float(), weight_MNH)


def select(
    query_MLQ: torch.Tensor,
    index: IndexInput,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    rope: RopeTable,
) -> torch.Tensor:
    """The positions that each query attends to, int32 [M, L, index_topk]; -1 where there are
    fewer. Queries and head weights may be fewer than keys: they are those of the last tokens.
    """
    count, length = query_MLQ.shape[:2]
    total = index.key_MLI.shape[1]
    num_selected, device = config.index_topk, query_MLQ.device
    topk_MLK = torch.full((count, length, num_selected), -1, dtype=torch.int32, device=device)
    for rows in chunks.slices(length, chunks.index_queries(count, total)):
        places = slice(total - length + rows.start, total - length + rows.stop)
        if places.stop <= num_selected:
            position_S = torch.arange(places.stop, dtype=torch.int32, device=device)
            earlier_NS = causal_mask(places, device=device)
            topk_MLK[:, rows, : places.stop] = torch.where(earlier_NS, position_S, -1)
            continue
        query_MNHI = _queries(query_MLQ[:, rows], weights, config, rope.rows(places))
        score_MNS = _scores(query_MNHI, index.key_MLI[:, : places.stop], index.weight_MLH[:, rows])
        size = rows.stop - rows.start
        later_NN = torch.ones(size, size, dtype=torch.bool, device=device).triu_(1)
        score_MNS[..., places.start :].masked_fill_(later_NN, -torch.inf)
        topk_MLK[:, rows] = _best(score_MNS, num_selected).int()
    return topk_MLK


def select_cached(
    query_TQ: torch.Tensor,
    index: IndexInput,
    position_MN: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    rope: RopeTable,
) -> torch.Tensor:
    """The same for few queries at any positions of their sequences: N queries of each of M, whose
    keys are [M, S, I] and head weights [M, N, H]; ``rope`` holds the T = M * N positions. Returns
    int64 [M, N, min(index_topk, S)], -1 where there are fewer.
    """
    query_MNHI = cached_queries(query_TQ, position_MN, weights, config, rope)
    count, num_keys = index.key_MLI.shape[:2]
    parts = []
    per_sequence = position_MN.shape[1] * config.index_n_heads * num_keys
    for some in chunks.slices(count, max(1, chunks.SCORE_ELEMENTS // per_sequence)):
        own = IndexInput(index.key_MLI[some], index.weight_MLH[some])
        parts.append(best_cached(score_cached(query_MNHI[some], own, position_MN[some]), config))
    return torch.cat(parts)


def cached_queries(
    query_TQ: torch.Tensor,
    position_MN: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    rope: RopeTable,
) -> torch.Tensor:
    """Index queries of M sequences, float32 [M, N, H, I]."""
    query_THI = _queries(query_TQ, weights, config, rope)
    return query_THI.unflatten(0, tuple(position_MN.shape))


def score_cached(
    query_MNHI: torch.Tensor, index: IndexInput, position_MN: torch.Tensor
) -> torch.Tensor:
    """Scores [M, N, S]; -inf for positions after a query's own."""
    place_S = torch.arange(index.key_MLI.shape[1], device=position_MN.device)
    query_MAI = query_MNHI.flatten(1, 2)
    score_MAS = torch.bmm(query_MAI, index.key_MLI.mT).relu_()
    score_MNHS = score_MAS.unflatten(1, query_MNHI.shape[1:3])
    score_MNS = (index.weight_MLH.unsqueeze(2) @ score_MNHS).squeeze(2)
    return score_MNS.masked_fill_(place_S > position_MN.unsqueeze(-1), -torch.inf)


def best_cached(score_MNS: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """What select_cached returns, of its scores."""
    return _best(score_MNS, min(config.index_topk, score_MNS.shape[-1]))


def _best(score_MNS: torch.Tensor, num_selected: int) -> torch.Tensor:
    best = score_MNS.topk(num_selected, dim=-1, sorted=False)
    return best.indices.masked_fill(best.values == -torch.inf, -1)


def _queries(
    query_TQ: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    rope: RopeTable,
) -> torch.Tensor:
    """Rotated queries of all heads, float32 [..., T, H, I]; ``rope`` holds the T positions."""
    query_THI = linear(query_TQ, weights["self_attn.indexer.wq_b.weight"])
    query_THI = query_THI.unflatten(-1, (config.index_n_heads, config.index_head_dim))
    return _rotate_front(query_THI, config, rope.for_heads()).float()


def causal_mask(rows: slice, *, device: torch.device) -> torch.Tensor:
    """Bool [len(rows), rows.stop], True at all positions up to each query's own."""
    causal_NS = torch.ones(rows.stop - rows.start, rows.stop, dtype=torch.bool, device=device)
    return causal_NS.tril_(rows.start)


def selection_mask(topk_MNK: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Bool [M, N, num_keys], True where the queries look."""
    chosen_MNK = topk_MNK.long()
    # One column more than there are keys takes the padding.
    mask_MNS = torch.zeros(
        *chosen_MNK.shape[:2], num_keys + 1, dtype=torch.bool, device=topk_MNK.device
    )
    mask_MNS.scatter_(-1, chosen_MNK.masked_fill(chosen_MNK < 0, num_keys), True)
    return mask_MNS[..., :num_keys]


def _rotate_front(x: torch.Tensor, config: ModelConfig, rope: RopeTable) -> torch.Tensor:
    turned = rotate(
        x[..., : config.qk_rope_head_dim], rope, interleave=config.indexer_rope_interleave
    )
    return torch.cat([turned, x[..., config.qk_rope_head_dim :]], -1)


def _scores(
    query_MNHI: torch.Tensor, key_MSI: torch.Tensor, weight_MNH: torch.Tensor
) -> torch.Tensor:
    """sum_h w_h relu(q_h . k), float32 [M, N, S], one head at a time in ascending order."""
    score_MNS = query_MNHI.new_zeros(*query_MNHI.shape[:2], key_MSI.shape[1])
    head_MNS = torch.empty_like(score_MNS)
    for head in range(query_MNHI.shape[2]):
        torch.bmm(query_MNHI[:, :, head], key_MSI.mT, out=head_MNS)
        score_MNS.addcmul_(head_MNS.relu_(), weight_MNH[:, :, head, None])
    return score_MNS
