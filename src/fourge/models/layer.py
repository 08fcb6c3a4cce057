"""One decoder layer over packed sequences, without padding: attention, then MLP or experts.

``hidden_TD`` holds the sequences one after the other; ``lengths`` sums to T; every sequence starts
at position 0. A layer's weights are a mapping from the checkpoint's names, relative to
"model.layers.L.", to tensors. The compute dtype is hidden_TD's. Sequences are attended one by one,
so a sequence's result does not depend on its neighbours.
"""

from collections.abc import Mapping, Sequence

import torch

from fourge.models import chunks, dsa, mla
from fourge.models.config import ModelConfig
from fourge.models.moe import Routed, dense_mlp, route, run_experts
from fourge.models.norm import rms_norm
from fourge.models.rope import RopeTable, rope_table

__all__ = [
    "RopeTable",
    "Routed",
    "TopK",
    "attend",
    "decoder_layer",
    "dense_mlp",
    "rope_table",
    "route",
    "run_experts",
]

# T tokens of all sequences, L tokens of one sequence, D hidden, N tokens of a chunk, K index_topk

# Per sequence: int32 [L, K], padded with -1, or None where every position is attended to.
TopK = Sequence[torch.Tensor | None]

_ATTENTION = ("self_attn.", "input_layernorm.")
# The indexer computes with these in float32 whatever the compute dtype.
_FLOAT32 = ("self_attn.indexer.weights_proj.", "self_attn.indexer.k_norm.")


def decoder_layer(
    hidden_TD: torch.Tensor,
    lengths: Sequence[int],
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    layer: int,
    rope: RopeTable,
    topk: TopK | None,
) -> tuple[torch.Tensor, TopK]:
    """The whole layer with all its weights at hand: hidden_TD and the selection for the next."""
    hidden_TD, topk = attend(hidden_TD, lengths, weights, config, layer, rope, topk)
    if not config.is_sparse(layer):
        return dense_mlp(hidden_TD, weights, config), topk
    routed = route(hidden_TD, weights, config)
    run_experts(routed, weights, range(config.n_routed_experts))
    return routed.acc_TD.to(hidden_TD.dtype), topk


def attend(
    hidden_TD: torch.Tensor,
    lengths: Sequence[int],
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    layer: int,
    rope: RopeTable,
    topk: TopK | None,
) -> tuple[torch.Tensor, TopK]:
    """hidden + attention(input_layernorm(hidden)), and the positions that were selected.

    A layer with an indexer selects anew and ignores ``topk``; a "shared" one uses it. The selection
    is None for a sequence of at most index_topk tokens, and in families without DSA.
    """
    assert sum(lengths) == len(hidden_TD), "lengths must add up to the rows of hidden_TD"
    shared = config.uses_dsa and not config.has_indexer(layer)
    assert not shared or topk is not None, "a shared layer needs the selection of a full one"
    weights = _cast_attention(weights, hidden_TD.dtype)
    out_TD = torch.empty_like(hidden_TD)
    selections: list[torch.Tensor | None] = []
    start = 0
    for number, length in enumerate(lengths):
        rows = slice(start, start + length)
        given = topk[number] if shared and topk is not None else None
        attended_LD, selection = _attend_sequence(
            hidden_TD[rows], weights, config, layer, rope, given
        )
        out_TD[rows] = hidden_TD[rows] + attended_LD.to(hidden_TD.dtype)
        selections.append(selection)
        start += length
    return out_TD, selections


def _attend_sequence(
    hidden_LD: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    layer: int,
    rope: RopeTable,
    topk: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention output float32 [L, D] and the selection that was used."""
    length = len(hidden_LD)
    selects = config.has_indexer(layer) and length > config.index_topk
    latents: list[mla.Latents] = []
    index: list[dsa.IndexInput] = []
    for rows in chunks.slices(length, chunks.ROWS):
        table = rope.rows(rows)
        x_ND = rms_norm(hidden_LD[rows], weights["input_layernorm.weight"], config.rms_norm_eps)
        latents.append(mla.project(x_ND, weights, config, table))
        if selects:
            index.append(dsa.project(x_ND, weights, config, table))
    joined = mla.Latents(*map(torch.cat, zip(*latents, strict=True)))
    if selects:
        index_input = dsa.IndexInput(*map(torch.cat, zip(*index, strict=True)))
        topk = dsa.select(joined.query_LQ, index_input, weights, config, rope)
    return mla.attend_naive(joined, weights, config, rope, topk), topk


def _cast_attention(
    weights: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The attention's weights in the compute dtype, cast once for all sequences."""
    return {
        name: weight.float() if name.startswith(_FLOAT32) else weight.to(dtype)
        for name, weight in weights.items()
        if name.startswith(_ATTENTION)
    }
