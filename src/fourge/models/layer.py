"""One decoder layer over packed sequences, without padding: attention, then MLP or experts.

``hidden_TD`` holds the sequences one after the other; ``lengths`` sums to T; every sequence starts
at position 0. A layer's weights are a mapping from the checkpoint's names, relative to
"model.layers.L.", to tensors. The compute dtype is hidden_TD's. Neighbouring sequences of one
length are attended side by side; none sees another.
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

# T tokens of all sequences, M sequences of one length, L tokens of each, D hidden,
# N tokens of a chunk, K index_topk

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
    for first, count in chunks.runs(lengths):
        stop = start + count * lengths[first]
        hidden_MLD = hidden_TD[start:stop].unflatten(0, (count, lengths[first]))
        given = _stack(topk[first : first + count]) if shared and topk is not None else None
        attended_MLD, selection = _attend_run(hidden_MLD, weights, config, layer, rope, given)
        out_TD[start:stop] = (hidden_MLD + attended_MLD.to(hidden_TD.dtype)).flatten(0, 1)
        selections += [None] * count if selection is None else selection.unbind()
        start = stop
    return out_TD, selections


def _stack(topk: TopK) -> torch.Tensor | None:
    """The selections of sequences of one length: all of them select, or none."""
    chosen = [selection for selection in topk if selection is not None]
    return torch.stack(chosen) if chosen else None


def _attend_run(
    hidden_MLD: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    layer: int,
    rope: RopeTable,
    topk_MLK: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention output float32 [M, L, D] and the selection that was used."""
    count, length = hidden_MLD.shape[:2]
    selects = config.has_indexer(layer) and length > config.index_topk
    latents: list[mla.Latents] = []
    index: list[dsa.IndexInput] = []
    for rows in chunks.slices(length, chunks.run_rows(count)):
        table = rope.rows(rows)
        x_MND = rms_norm(
            hidden_MLD[:, rows], weights["input_layernorm.weight"], config.rms_norm_eps
        )
        latents.append(mla.project(x_MND, weights, config, table))
        if selects:
            index.append(dsa.project(x_MND, weights, config, table))
    joined = mla.Latents(*(torch.cat(parts, 1) for parts in zip(*latents, strict=True)))
    if selects:
        indexed = dsa.IndexInput(*(torch.cat(parts, 1) for parts in zip(*index, strict=True)))
        topk_MLK = dsa.select(joined.query_MLQ, indexed, weights, config, rope)
    return mla.attend_naive(joined, weights, config, rope, topk_MLK), topk_MLK


def _cast_attention(
    weights: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The attention's weights in the compute dtype, cast once for all sequences."""
    return {
        name: weight.float() if name.startswith(_FLOAT32) else weight.to(dtype)
        for name, weight in weights.items()
        if name.startswith(_ATTENTION)
    }
