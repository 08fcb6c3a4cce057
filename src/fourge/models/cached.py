"""One decoder layer over the new tokens of many sequences, whose earlier tokens lie in a cache.

The twin of layer.py for an engine. ``hidden_TD`` holds the new tokens of all sequences one after
the other; linears and experts see them all at once, attention goes run by run: M sequences that
bring N tokens each. Latents and index keys are written to the cache before anything is read, so
that a token can select itself. Many queries of one sequence are attended in the naive form, few
queries in the absorbed form, over what the indexer selected alone. A sequence's positions are its
own; the cache's slots are found through ``Run``.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from fourge.checkpoint.names import FUSED_GATE_UP
from fourge.models import dsa, mla
from fourge.models.config import ModelConfig
from fourge.models.moe import dense_mlp, route, run_experts, run_fused_experts
from fourge.models.norm import rms_norm
from fourge.models.rope import RopeTable

# T new tokens, D hidden, M sequences of a run, N new tokens of each, P pages of the longest,
# S positions up to its last, X latent and rotated key, I index head size, K selected positions

# A run of more queries than this is attended in the naive form; it has one sequence.
FEW_QUERIES = 16


class Cache(Protocol):
    """Where latents and index keys of earlier tokens lie."""

    def write(
        self, layer: int, slot_T: torch.Tensor, latents: mla.Latents, key_TI: torch.Tensor | None
    ) -> None:
        """Keep the T tokens of ``latents`` [T, ...], and index keys where the layer has them."""
        ...

    def read_latents(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        """[c | kr] of slots of any shape: [..., X]."""
        ...

    def latent_rows(self, layer: int) -> torch.Tensor:
        """[slots, row] as they are kept."""
        ...

    def index_pages(self, layer: int) -> torch.Tensor:
        """[pages, page] of a layer with an indexer, as they are kept."""
        ...

    def read_index_keys(self, layer: int, page_MP: torch.Tensor) -> torch.Tensor:
        """float32 [M, tokens of P pages, I]."""
        ...


class Run(NamedTuple):
    """M sequences that bring N new tokens each."""

    rows: slice  # of the step's tokens: M * N
    page_MP: torch.Tensor
    slot_MS: torch.Tensor  # of every position up to the last; anything beyond a sequence's own
    position_MN: torch.Tensor
    first: int  # the slot, counted from the first page's first, where position 0 lies


class Step(NamedTuple):
    """The new tokens of one pass through the model."""

    slot_T: torch.Tensor
    rope: RopeTable  # of the tokens' positions
    whole_rope: RopeTable  # of all positions
    runs: tuple[Run, ...]
    looks_again: bool = False  # at what the selections say, in a layer with an indexer too


class Selection(NamedTuple):
    """What the queries of a run of few queries look at."""

    slot_TK: torch.Tensor
    seen_TK: torch.Tensor


# Per run: what its queries look at, for many queries int32 [1, N, K] as in dsa.select; None: all.
Selections = Sequence[Selection | torch.Tensor | None]


class _Layer(NamedTuple):
    weights: Mapping[str, torch.Tensor]
    config: ModelConfig
    number: int
    cache: Cache
    step: Step


def cached_layer(
    hidden_TD: torch.Tensor,
    step: Step,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    layer: int,
    cache: Cache,
    selections: Selections,
) -> tuple[torch.Tensor, Selections]:
    """The whole layer; ``selections`` are those of the layer before, as a "shared" one needs them,
    or of the step before if this one looks again.
    Weights are in the compute dtype, those of the indexer's keys and head weights and of the router
    in float32; experts fused, or one by one.
    """
    latents, index = keep(hidden_TD, step, weights, config, layer, cache)
    if step.looks_again:
        index = None
    elif index is not None:
        selections = [None] * len(step.runs)
    here = _Layer(weights, config, layer, cache, step)
    out_TD = torch.empty_like(hidden_TD)
    chosen: list[Selection | torch.Tensor | None] = []
    for run, selection in zip(step.runs, selections, strict=True):
        query_TQ = latents.query_MLQ[run.rows]
        if index is not None and run.slot_MS.shape[1] > config.index_topk:
            selection = _select(query_TQ, index.weight_MLH[run.rows], run, here)
        chosen.append(selection)
        out_TD[run.rows] = _attend(query_TQ, run, selection, here)
    return _mlp(hidden_TD + out_TD, weights, config, layer), chosen


def keep(
    hidden_TD: torch.Tensor,
    step: Step,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    layer: int,
    cache: Cache,
) -> tuple[mla.Latents, dsa.IndexInput | None]:
    """What the cache holds of a step's tokens; all that is needed where nobody reads the layer's
    output. Returns what was projected.
    """
    x_TD = rms_norm(hidden_TD, weights["input_layernorm.weight"], config.rms_norm_eps)
    latents = mla.project(x_TD, weights, config, step.rope)
    index = dsa.project(x_TD, weights, config, step.rope) if config.has_indexer(layer) else None
    cache.write(layer, step.slot_T, latents, None if index is None else index.key_MLI)
    return latents, index


def _mlp(
    hidden_TD: torch.Tensor, weights: Mapping[str, torch.Tensor], config: ModelConfig, layer: int
) -> torch.Tensor:
    if not config.is_sparse(layer):
        return dense_mlp(hidden_TD, weights, config)
    routed = route(hidden_TD, weights, config)
    if FUSED_GATE_UP in weights:
        return run_fused_experts(routed, weights).to(hidden_TD.dtype)
    run_experts(routed, weights, range(config.n_routed_experts))
    return routed.acc_TD.to(hidden_TD.dtype)


def _is_long(run: Run) -> bool:
    return run.position_MN.shape[1] > FEW_QUERIES


def _select(
    query_TQ: torch.Tensor, weight_TH: torch.Tensor, run: Run, here: _Layer
) -> Selection | torch.Tensor:
    rope = here.step.rope.rows(run.rows)
    num_keys = run.slot_MS.shape[1]
    pages = here.cache.index_pages(here.number)
    if pages.is_cuda and not _is_long(run):
        from fourge.models.kernels import gpu_index

        if gpu_index.can_score(pages, here.config.index_head_dim):
            query_MNHI = dsa.cached_queries(
                query_TQ, run.position_MN, here.weights, here.config, rope
            )
            weight_MNH = weight_TH.unflatten(0, tuple(run.position_MN.shape))
            score_MNS = gpu_index.score_pages(
                query_MNHI, weight_MNH, pages, run.page_MP, run.position_MN, num_keys, run.first
            )
            return _selection(dsa.best_cached(score_MNS, here.config), run)
    key_MSI = here.cache.read_index_keys(here.number, run.page_MP)
    key_MSI = key_MSI[:, run.first : run.first + num_keys]
    if _is_long(run):
        index = dsa.IndexInput(key_MSI, weight_TH[None])
        return dsa.select(query_TQ[None], index, here.weights, here.config, here.step.whole_rope)
    index = dsa.IndexInput(key_MSI, weight_TH.unflatten(0, tuple(run.position_MN.shape)))
    position_MNK = dsa.select_cached(
        query_TQ, index, run.position_MN, here.weights, here.config, rope
    )
    return _selection(position_MNK, run)


def _selection(position_MNK: torch.Tensor, run: Run) -> Selection:
    position_MA = position_MNK.flatten(1).clamp(min=0)
    slot_TK = run.slot_MS.gather(1, position_MA).view_as(position_MNK).flatten(0, 1)
    return Selection(slot_TK, (position_MNK >= 0).flatten(0, 1))


def everything(run: Run) -> Selection:
    """What the queries of a run of few queries look at where nothing was selected."""
    seen_MNS = _seen(run)
    slot_MNS = run.slot_MS.unsqueeze(1).expand_as(seen_MNS)
    return Selection(slot_MNS.flatten(0, 1), seen_MNS.flatten(0, 1))


def _seen(run: Run) -> torch.Tensor:
    place_S = torch.arange(run.slot_MS.shape[1], device=run.slot_MS.device)
    return place_S <= run.position_MN.unsqueeze(-1)


def _attend(
    query_TQ: torch.Tensor, run: Run, selection: Selection | torch.Tensor | None, here: _Layer
) -> torch.Tensor:
    """Attention output [T, D] of a run's queries."""
    if isinstance(selection, Selection):
        return _attend_selected(query_TQ, run, selection, here)
    weights, config, step = here.weights, here.config, here.step
    if not _is_long(run):
        if _in_place(here):
            return _attend_selected(query_TQ, run, everything(run), here)
        seen_MNS = _seen(run)
        key_MSX = here.cache.read_latents(here.number, run.slot_MS)
        rope = step.rope.rows(run.rows)
        return mla.attend_absorbed(query_TQ, key_MSX, seen_MNS, weights, config, rope)
    key_MSX = here.cache.read_latents(here.number, run.slot_MS)
    widths = [config.kv_lora_rank, config.qk_rope_head_dim]
    latents = mla.Latents(query_TQ[None], *key_MSX.to(query_TQ.dtype).split(widths, -1))
    out_MND = mla.attend_naive(latents, weights, config, step.whole_rope, selection)
    return out_MND[0].to(query_TQ.dtype)


def _attend_selected(
    query_TQ: torch.Tensor, run: Run, selection: Selection, here: _Layer
) -> torch.Tensor:
    weights, config, rope = here.weights, here.config, here.step.rope.rows(run.rows)
    if not _in_place(here):
        key_TKX = here.cache.read_latents(here.number, selection.slot_TK)
        seen_T1K = selection.seen_TK.unsqueeze(1)
        return mla.attend_absorbed(query_TQ, key_TKX, seen_T1K, weights, config, rope)
    from fourge.models.kernels import gpu_attention

    query_THX = mla.absorb(query_TQ, weights, config, rope, torch.bfloat16)
    mixed_THC = gpu_attention.attend_rows(
        query_THX, here.cache.latent_rows(here.number), *selection, mla.softmax_scale(config),
        config.kv_lora_rank,
    )  # fmt: skip
    return mla.project_out(mixed_THC, weights, config, query_TQ.dtype)


def _in_place(here: _Layer) -> bool:
    """Whether few queries read the cache where it lies, in a kernel."""
    rows = here.cache.latent_rows(here.number)
    if not rows.is_cuda:
        return False
    from fourge.models.kernels import gpu_attention

    return gpu_attention.can_attend(rows, here.config.kv_lora_rank)
