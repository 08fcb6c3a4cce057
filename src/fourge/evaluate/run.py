"""The run: every stream through every layer, then the vocabulary.

    for layer in what is not done:
        for model in reference and candidates:      one model's layer in memory at a time
            read it, take all tokens of its streams through it, commit their outputs
        compare every stream with the reference, keep the figures, drop the layer's input
Killed anywhere, the same call goes on from the files that have their final names.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from fourge.checkpoint.header import TensorInfo
from fourge.checkpoint.names import parse
from fourge.checkpoint.source import FileReader, TensorStream, check_finite, read_all_tensors
from fourge.checkpoint.writer import write_json
from fourge.errors import CheckpointError
from fourge.evaluate import scoring
from fourge.evaluate.attribution import attribute
from fourge.evaluate.divergence import Positions
from fourge.evaluate.plan import Job
from fourge.evaluate.streams import LayerPassage, Model, input_scale_tensors, input_scales
from fourge.layerwise.budget import STAGING_BYTES
from fourge.layerwise.embedding import look_up, pieces_of
from fourge.layerwise.folders import remove_partial
from fourge.layerwise.groups import Group
from fourge.layerwise.machine import device_bytes
from fourge.layerwise.progress import OnProgress, Progress
from fourge.models.moe import InputScales
from fourge.models.rope import RopeTable, rope_table

Weights = Mapping[str, torch.Tensor]


@torch.no_grad()
def evaluate(job: Job, on_progress: OnProgress) -> tuple[dict[str, Positions], list[dict]]:
    """Positions of every stream but the reference, and the records of the layers.

    Raises FourgeError subclasses; what was committed stays and is not done again.
    """
    progress = Progress(
        layers=job.config.num_hidden_layers,
        budget=job.memory.host_budget,
        device_bytes=device_bytes,
        notify=on_progress,
    )
    _clean(job)
    progress.begin(_work_left(job))
    _embed(job, progress)
    _run_layers(job, progress)
    progress.stage("lm_head", layers_done=job.config.num_hidden_layers)
    positions = scoring.score(
        job.models,
        job.corpus.tokens,
        device=job.device,
        advance=lambda count: progress.advance(work=count * len(job.others), read=count),
    )
    return positions, [_record(job, layer) for layer in range(job.config.num_hidden_layers)]


def _clean(job: Job) -> None:
    """Make the streams' folders, and remove what an interrupted run had not finished."""
    for stream in (job.reference, *job.others):
        stream.folder.mkdir(parents=True, exist_ok=True)
        remove_partial(path.with_suffix("") for path in stream.folder.glob("*.partial"))


def _record_path(job: Job, layer: int) -> Path:
    return job.work / f"layer-{layer:05d}.json"


def _record(job: Job, layer: int) -> dict:
    return json.loads(_record_path(job, layer).read_bytes())


def _layers_left(job: Job) -> list[int]:
    layers = range(job.config.num_hidden_layers)
    return [layer for layer in layers if not _record_path(job, layer).exists()]


def _work_left(job: Job) -> int:
    """In bytes of weights times streams that they are for."""
    work = sum(
        _layer_bytes(model, layer) * len(model.pending(layer))
        for layer in _layers_left(job)
        for model in job.models
    )
    return max(1, work + scoring.head_bytes(job.models[0]) * len(job.models) * len(job.others))


def _layer_bytes(model: Model, layer: int) -> int:
    """Bytes of a layer of one model."""
    return sum(info.nbytes for group in model.groups[layer] for info in group.tensors)


def _embed(job: Job, progress: Progress) -> None:
    """Every stream's input, from its own model's embedding."""
    if 0 not in _layers_left(job):
        return
    for model in job.models:
        streams = [one for one in model.streams if not any(map(one.has_entered, (0, 1)))]
        if not streams:
            continue
        progress.stage("embedding", layers_done=0)
        info = model.source.tensors["model.embed_tokens.weight"]
        # Several checkpoints have one, and messages hold the name.
        info = info._replace(name=f"{info.name} of {model.source.folder}")
        files = [stream.entering(job.config, 0).create() for stream in streams]
        try:
            with FileReader(model.source.folder) as reader:
                pieces = ((first, rows) for _, first, rows in pieces_of(reader, [info]))
                look_up(pieces, job.corpus.tokens, job.config, job.batches, files)
            for file in files:
                file.commit()
        finally:
            for file in files:
                file.close()


def _run_layers(job: Job, progress: Progress) -> None:
    left = _layers_left(job)
    rope = rope_table(job.config, int(job.corpus.lengths.max()), job.device)
    todo = [(layer, model) for layer in left for model in job.models if model.pending(layer)]
    groups = [_anchored(group, model) for layer, model in todo for group in model.groups[layer]]
    # Absolute names, so that one stream reads ahead across all checkpoints.
    weights = iter(TensorStream(Path("/"), groups, device=job.device, staging_bytes=STAGING_BYTES))
    for layer in left:
        for number, model in enumerate(job.models):
            if (layer, model) in todo:
                title = f"layer {layer}, {'candidate' if number else 'reference'}"
                progress.stage(title, layers_done=layer)
                share = len(model.pending(layer)) / job.tokens
                for nbytes, tokens in _run_layer(job, model, layer, weights, rope):
                    progress.advance(work=nbytes * tokens * share, tokens=tokens)
                progress.advance(read=_layer_bytes(model, layer))
        record = attribute(job.reference, job.others, job.config, layer, job.tokens)
        _check_outcome(job, record)
        write_json(_record_path(job, layer), record)
        for one in (job.reference, *job.others):
            one.forget_before(layer + 1)


def _anchored(group: Group, model: Model) -> list[TensorInfo]:
    folder = str(model.source.folder.absolute())
    return [info._replace(file=os.path.join(folder, info.file)) for info in group.tensors]


def _run_layer(
    job: Job, model: Model, layer: int, stream: Iterator[Weights], rope: RopeTable
) -> Iterator[tuple[int, int]]:
    """Take all tokens through a layer of one model. Yields, after every batch of a group, its bytes
    of weights and the tokens.
    """
    scales = _input_scales(job, model, layer)
    with LayerPassage(model, layer, rope, device=job.device) as passage:
        for group in model.groups[layer]:
            weights = next(stream)
            _check_weights(model, weights)
            local = {parse(name).suffix: tensor for name, tensor in weights.items()}
            nbytes = sum(info.nbytes for info in group.tensors)
            for batch in job.batches:
                passage.run(group, local, batch, scales)
                yield nbytes, batch.tokens
        passage.commit()


def _check_weights(model: Model, weights: Weights) -> None:
    """CheckpointError if a weight or a scale of it is NaN or infinite; ``input_scale`` is checked
    by those who use it.
    """
    for name, tensor in weights.items():
        if tensor.dtype == torch.float8_e4m3fn:
            # E4M3 has no infinity; NaN is all ones but the sign.
            tensor = torch.where(tensor.view(torch.uint8) & 0x7F == 0x7F, torch.nan, 0.0)
        if tensor.is_floating_point() and not name.endswith(".input_scale"):
            check_finite(f"{name} of {model.source.folder}", tensor)


def _check_outcome(job: Job, record: Mapping) -> None:
    """CheckpointError if finite weights led to values that are not, as scales do that are far too
    large: no figure could be made of them.
    """
    for model in job.models:
        for stream in model.streams:
            if stream in job.others and not math.isfinite(record[stream.name]["hidden_error"]):
                raise CheckpointError(
                    f"layer {record['layer']} of {model.source.folder} gives values that are NaN or"
                    f" infinite (lane {stream.lane}): its scales are damaged or far too large; run"
                    " fourge doctor on it."
                )


def _input_scales(job: Job, model: Model, layer: int) -> InputScales | None:
    """The scales for streams that round inputs; read apart, since a group may lack some experts."""
    if not job.config.is_sparse(layer) or not any(one.rounds_inputs for one in model.streams):
        return None
    infos = [info for group in model.groups[layer] for info in group.tensors]
    with FileReader(model.source.folder) as files:
        values = read_all_tensors(files, input_scale_tensors(infos))
    local = {parse(name).suffix: value for name, value in values.items()}
    scales = input_scales(local, job.config, scales_of=job.scales_of)
    if not all(bool(_are_scales(scale_E).all()) for scale_E in scales):
        name = next(name for name, value in values.items() if not bool(_are_scales(value).all()))
        raise CheckpointError(
            f"{name} of {model.source.folder} is {values[name].item()}, not a positive number: run"
            " fourge doctor on it, or evaluate with --lane w4a16."
        )
    return InputScales(*(scale_E.to(job.device) for scale_E in scales))


def _are_scales(values: torch.Tensor) -> torch.Tensor:
    return (values > 0) & torch.isfinite(values)
