"""What an evaluation will hold in memory and on disk, and how layers are cut into what fits.

Only decoder layers count; the MTP layer is not evaluated. Imports no torch but for its dtypes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fourge.calibrate.corpus import Corpus
from fourge.evaluate import scoring
from fourge.evaluate.figures import WINDOW_BYTES
from fourge.evaluate.streams import FLOOR, REFERENCE, Model, Stream
from fourge.layerwise.activations import Batch
from fourge.layerwise.budget import (
    COPY_BUFFER_BYTES,
    Budget,
    MemoryPlan,
    Needs,
    embedding_bytes,
    fit,
)
from fourge.layerwise.groups import by_layer, cut, measure_pieces, split_experts
from fourge.models.chunks import ROWS
from fourge.models.config import ModelConfig
from fourge.models.footprint import FLOAT32, Load, compute_bytes
from fourge.models.survey import Source

# Tokens that go through a layer together; a longer window goes alone.
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Job:
    """One evaluation, planned: models with their streams, tokens, places."""

    models: tuple[Model, ...]  # the reference first
    corpus: Corpus
    batches: tuple[Batch, ...]
    lanes: tuple[str, ...]
    scales_of: str
    memory: MemoryPlan
    work: Path
    device: torch.device

    @property
    def config(self) -> ModelConfig:
        return self.models[0].source.config

    @property
    def tokens(self) -> int:
        return len(self.corpus.tokens)

    @property
    def reference(self) -> Stream:
        return self.models[0].streams[0]

    @property
    def others(self) -> tuple[Stream, ...]:
        """All streams but the reference."""
        return tuple(one for model in self.models for one in model.streams)[1:]


def plan_memory(
    sources: Sequence[Source], load: Load, lengths: Sequence[int], num_streams: int, budget: Budget
) -> MemoryPlan:
    """Fit the run over windows of these lengths into ``budget``; BudgetError, with the smallest
    that works, if it cannot.
    """
    config, tokens = sources[0].config, sum(lengths)
    device = "cuda" if budget.on_device else "cpu"
    # The reference computes in FP32, so that is what temporaries are reckoned with.
    compute = compute_bytes(config, load, itemsize=FLOAT32)
    attribution = 4 * ROWS * config.hidden_size * 8
    kept = tokens * 4 + scoring.token_bytes(tokens, num_streams)
    kept += len(lengths) * num_streams * WINDOW_BYTES
    score = scoring.working_bytes(config, len(sources), num_streams, device)
    looked_up = embedding_bytes(config, tokens, load) + COPY_BUFFER_BYTES
    needs = Needs(
        host=kept + attribution,
        compute=max(compute, score) if budget.on_device else compute,
        at_start=kept + max(looked_up, score),
        rows=3 * load.batch_tokens * config.hidden_size * FLOAT32,
    )
    parts = [
        split_experts(layers[layer])
        for layers in (by_layer(source.tensors) for source in sources)
        for layer in range(config.num_hidden_layers)
    ]
    return fit(measure_pieces(parts), needs, budget)


def disk_bytes(models: Sequence[Model], tokens: int) -> int:
    """What the activations of all streams will take at most."""
    row, config = 0, models[0].source.config
    for model in models:
        grouped = any(len(groups) > 1 for groups in model.groups)
        for stream in model.streams:
            row += 2 * stream.dtype.itemsize * config.hidden_size + 2 * config.num_experts_per_tok
            if "shared" in config.indexer_types:
                row += 2 * 4 * config.index_topk
            if grouped:
                waiting = (stream.dtype.itemsize + FLOAT32) * config.hidden_size
                row += waiting + 12 * config.num_experts_per_tok
    return tokens * row


def make_models(
    sources: Sequence[Source],
    lanes: Sequence[str],
    dtype: torch.dtype,
    work: Path,
    memory: MemoryPlan,
) -> tuple[Model, ...]:
    """The reference and the candidates, each with its streams; ``dtype`` is the candidates'."""
    models = []
    for number, source in enumerate(sources):
        if number == 0:
            kinds = [(REFERENCE, REFERENCE, torch.float32), (FLOOR, FLOOR, dtype)]
        else:
            kinds = [(f"{lane}-{number}", lane, dtype) for lane in lanes]
        streams = tuple(Stream(name, lane, work / name, kind) for name, lane, kind in kinds)
        layers = by_layer(source.tensors)
        groups = tuple(
            cut(layer, split_experts(layers[layer]), memory.largest_group)
            for layer in range(source.config.num_hidden_layers)
        )
        models.append(Model(f"model-{number}", source, streams, groups))
    return tuple(models)
