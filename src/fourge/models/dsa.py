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
    """The positions that each token attends to, int32 [M, L, index_topk]; -1 where there are
    fewer.
    """
    count, length = query_MLQ.shape[:2]
    num_selected, device = config.index_topk, query_MLQ.device
    topk_MLK = torch.full((count, length, num_selected), -1, dtype=torch.int32, device=device)
    for rows in chunks.slices(length, chunks.index_queries(count, length)):
        if rows.stop <= num_selected:
            position_S = torch.arange(rows.stop, dtype=torch.int32, device=device)
            earlier_NS = causal_mask(rows, device=device)
            topk_MLK[:, rows, : rows.stop] = torch.where(earlier_NS, position_S, -1)
            continue
        query_MNHI = linear(query_MLQ[:, rows], weights["self_attn.indexer.wq_b.weight"])
        query_MNHI = query_MNHI.unflatten(-1, (config.index_n_heads, config.index_head_dim))
        query_MNHI = _rotate_front(query_MNHI, config, rope.rows(rows).for_heads()).float()
        score_MNS = _scores(query_MNHI, index.key_MLI[:, : rows.stop], index.weight_MLH[:, rows])
        size = rows.stop - rows.start
        later_NN = torch.ones(size, size, dtype=torch.bool, device=device).triu_(1)
        score_MNS[..., rows.start :].masked_fill_(later_NN, -torch.inf)
        best = score_MNS.topk(num_selected, dim=-1, sorted=False)
        topk_MLK[:, rows] = best.indices.masked_fill(best.values == -torch.inf, -1).int()
    return topk_MLK


def causal_mask(rows: slice, *, device: torch.device) -> torch.Tensor:
    """Bool [len(rows), rows.stop], True at all positions up to each query's own."""
    causal_NS = torch.ones(rows.stop - rows.start, rows.stop, dtype=torch.bool, device=device)
    return causal_NS.tril_(rows.start)


def selection_mask(topk_MLK: torch.Tensor, rows: slice) -> torch.Tensor:
    """Bool [M, len(rows), rows.stop], True where the queries ``rows`` look."""
    num_keys = rows.stop
    chosen_MNK = topk_MLK[:, rows].long()
    # One column more than there are keys takes the padding.
    mask_MNS = torch.zeros(
        *chosen_MNK.shape[:2], num_keys + 1, dtype=torch.bool, device=topk_MLK.device
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
