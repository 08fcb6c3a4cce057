"""From a request to records: validate, lock, gather tokens, plan, run, write.

Cheapest checks first: places, headers, whether the checkpoints are of one model. The record of an
evaluation lies in the candidate, ``fourge/evaluation/<id>.json``; the id stands for everything that
decides its figures, so the same request finds a finished record, or the work of an interrupted run.
"""

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

from fourge import __version__
from fourge.calibrate.corpus import Corpus, PassSpec, Progress
from fourge.calibrate.sources import identify_data
from fourge.checkpoint.names import Role, parse
from fourge.checkpoint.writer import write_json
from fourge.errors import CheckpointError, ConfigError, OutputError
from fourge.evaluate import receipt as receipts
from fourge.evaluate.divergence import Positions
from fourge.evaluate.figures import lane_figures, paired
from fourge.evaluate.plan import BATCH_TOKENS, Job, disk_bytes, make_models, plan_memory
from fourge.evaluate.run import evaluate
from fourge.evaluate.streams import FLOOR
from fourge.evaluate.windows import gather, pass_specs, windows_of
from fourge.layerwise.activations import make_batches
from fourge.layerwise.folders import (
    OWN_FOLDER,
    check_space,
    locked,
    own_folders,
    read_record,
)
from fourge.layerwise.machine import (
    choose_device,
    choose_dtype,
    dtype_name,
    measure,
    measure_budget,
    out_of_device_memory,
)
from fourge.layerwise.progress import OnProgress
from fourge.models.footprint import FLOAT32, Load
from fourge.models.survey import (
    Source,
    config_digest,
    file_digests,
    survey,
    survey_quantized,
)

EVALUATION_FOLDER = "evaluation"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for; memory in bytes, None for what the machine has free."""

    checkpoints: tuple[Path, ...]
    reference: Path
    data: tuple[str, ...]
    lanes: tuple[str, ...]
    tokens: int
    context: int
    seed: int
    scales_of: str = "layer"
    device: str = "auto"
    dtype: str = "auto"
    memory: int | None = None
    device_memory: int | None = None
    work: Path | None = None
    record: Path | None = None


class Outcome(NamedTuple):
    """A record per candidate, where they lie, and whether there was nothing left to do."""

    records: list[dict]
    paths: list[Path]
    was_finished: bool


@dataclass(frozen=True)
class _Setting:
    """A request that has been looked over."""

    request: Request
    sources: tuple[Source, ...]  # the reference first
    specs: list[PassSpec]
    device: torch.device
    dtype: torch.dtype
    identity: dict

    @property
    def id(self) -> str:
        text = json.dumps(self.identity, sort_keys=True).encode()
        return hashlib.sha256(text).hexdigest()[:12]


def run_request(request: Request, *, on_data: Progress, on_progress: OnProgress) -> Outcome:
    """Do all of it, or what is left of it. Raises FourgeError."""
    began = time.monotonic()
    setting = _look_over(request)
    paths = _record_paths(setting)
    work = (request.work or paths[0].parent) / f"work-{setting.id}"
    if (done := _finished(paths)) is not None:
        _remove_left(work)
        return Outcome(done, paths, was_finished=True)
    with own_folders(*(path.parent for path in paths), work), locked(work):
        if (done := _finished(paths)) is not None:
            return Outcome(done, paths, was_finished=True)
        corpus = _corpus(setting, work, on_data)
        job = _plan(setting, corpus, work)
        with receipts.FileHashes(setting.sources, work / "hashes.json") as hashes:
            positions, layers = _evaluate(job, on_progress)
            records = _records(setting, job, positions, layers, hashes)
        for record, path in zip(records, paths, strict=True):
            record["receipt"] |= measure(time.monotonic() - began)
            write_json(path, record)
        shutil.rmtree(work)
    return Outcome(records, paths, was_finished=False)


def _look_over(request: Request) -> _Setting:
    reference = _decoder_only(survey(request.reference, mtp="drop"))
    candidates = [_decoder_only(survey_quantized(folder)) for folder in request.checkpoints]
    for candidate in candidates:
        _check_same_model(reference, candidate)
        if "w4a4" in request.lanes:
            _check_input_scales(candidate)
    specs = pass_specs(
        request.data, tokens=request.tokens, context=request.context, seed=request.seed
    )
    device = choose_device(request.device)
    dtype = _candidate_dtype(request.dtype, device)
    sources = (reference, *candidates)
    identity = {
        "fourge": __version__,
        "method": receipts.METHOD,
        "checkpoints": [_identify(source) for source in sources],
        "text": _text_digests(reference),
        "data": {spec.name: identify_data(spec.data) for spec in specs},
        "lanes": request.lanes,
        "tokens": request.tokens,
        "context": request.context,
        "seed": request.seed,
        "input_scale": request.scales_of,
        "arithmetic": f"{device.type} {dtype_name(dtype)}",
    }
    return _Setting(request, sources, specs, device, dtype, identity)


def _candidate_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is BF16 on a GPU, as engines compute, and FP32 on the CPU, where models are small
    and the rounding of the arithmetic would only blur what quantization does.
    """
    if name == "auto" and device.type == "cpu":
        return torch.float32
    return choose_dtype(name, device)


def _decoder_only(source: Source) -> Source:
    """Without the MTP layer, which speculates and does not change what is said."""
    layers = source.config.mtp_layers
    kept = {name: info for name, info in source.tensors.items() if parse(name).layer not in layers}
    return replace(source, tensors=kept)


def _check_same_model(reference: Source, candidate: Source) -> None:
    """Everything that the forward pass reads from config.json must be equal."""

    def essence(source: Source) -> dict:
        config = replace(source.config, num_nextn_predict_layers=0, unknown_keys=(), warnings=())
        return {name: getattr(config, name) for name in config.__slots__}

    ours, theirs = essence(candidate), essence(reference)
    changed = [name for name in ours if ours[name] != theirs[name]]
    if changed:
        name = changed[0]
        raise ConfigError(
            f"{candidate.folder} and the reference {reference.folder} are different models:"
            f" {name} is {ours[name]!r} and {theirs[name]!r}; give the checkpoint that it was"
            " quantized from, or correct config.json (fourge doctor says where)."
        )


def _check_input_scales(candidate: Source) -> None:
    weights = [
        name
        for name, info in candidate.tensors.items()
        if info.dtype == "U8" and parse(name).role == Role.ROUTED_EXPERT
    ]
    missing = [
        name
        for name in weights
        if name.removesuffix("weight") + "input_scale" not in candidate.tensors
    ]
    if missing or not weights:
        found = (
            f"{len(missing)} expert projections lack input_scale, first {missing[0]}"
            if missing
            else "no NVFP4 experts"
        )
        raise CheckpointError(
            f"the lane w4a4 needs NVFP4 experts with input_scale, and {candidate.folder} has"
            f" {found}: evaluate with --lane w4a16, or see what fourge doctor says."
        )


def _identify(source: Source) -> dict:
    """What tells that a checkpoint's files are still the same, without reading them."""
    states = {file: (source.folder / file).stat() for file in source.shards}
    return {
        "folder": str(source.folder.resolve()),
        "config.json": config_digest(source),
        "shards": {file: [one.st_size, one.st_mtime_ns] for file, one in states.items()},
    }


def _text_digests(reference: Source) -> dict[str, str]:
    """Of tokenizer and chat template among others: what makes tokens of text."""
    files = tuple(path for path in reference.other_files if len(path.parts) == 1)
    return file_digests(replace(reference, other_files=files))


def _record_paths(setting: _Setting) -> list[Path]:
    chosen = setting.request.record
    paths = []
    for number, source in enumerate(setting.sources[1:]):
        folder = chosen or source.folder / OWN_FOLDER / EVALUATION_FOLDER
        suffix = f"-{number + 1}" if len(setting.sources) > 2 else ""
        paths.append(folder / f"{setting.id}{suffix}.json")
    return paths


def _finished(paths: Sequence[Path]) -> list[dict] | None:
    records = [record for path in paths if "receipt" in (record := read_record(path) or {})]
    return records if len(records) == len(paths) else None


def _remove_left(work: Path) -> None:
    """What a process left that was killed after its records were written."""
    with suppress(OSError, OutputError):
        if work.is_dir():
            with locked(work):
                shutil.rmtree(work)


def _corpus(setting: _Setting, work: Path, on_data: Progress) -> Corpus:
    """The tokens that an interrupted run kept, else new ones."""
    if (work / "corpus.json").exists():
        return Corpus.load(work)
    corpus = gather(setting.specs, setting.sources[0], on_data)
    corpus.save(work)
    return corpus


def _plan(setting: _Setting, corpus: Corpus, work: Path) -> Job:
    request, sources = setting.request, setting.sources
    lengths = corpus.lengths.tolist()
    batches = make_batches(lengths, corpus.pass_of.tolist(), batch_tokens=BATCH_TOKENS)
    load = Load(max(batch.tokens for batch in batches), max(lengths))
    num_streams = 2 + len(request.lanes) * len(request.checkpoints)
    budget = measure_budget(
        setting.device,
        memory=request.memory,
        device_memory=request.device_memory,
        itemsize=FLOAT32,
    )
    memory = plan_memory(sources, load, lengths, num_streams, budget)
    models = make_models(sources, request.lanes, setting.dtype, work, memory)
    kept = sum(path.stat().st_blocks * 512 for path in work.rglob("*.bin"))
    check_space([(work, max(0, disk_bytes(models, sum(lengths)) - kept))])
    return Job(
        models, corpus, tuple(batches), request.lanes, request.scales_of, memory, work,
        setting.device,
    )  # fmt: skip


def _evaluate(job: Job, on_progress: OnProgress) -> tuple[dict[str, Positions], list[dict]]:
    try:
        return evaluate(job, on_progress)
    except torch.OutOfMemoryError as error:
        raise out_of_device_memory(error) from error


# ---- records


def _records(
    setting: _Setting,
    job: Job,
    positions: Mapping[str, Positions],
    layers: Sequence[Mapping],
    hashes: receipts.FileHashes,
) -> list[dict]:
    windows, config = windows_of(job.corpus), job.config
    index_topk = config.index_topk if config.uses_dsa else None
    seed = setting.request.seed
    figures = {
        name: lane_figures(of_stream, windows, index_topk=index_topk, seed=seed)
        for name, of_stream in positions.items()
    }
    records = []
    for number, model in enumerate(job.models[1:], start=1):
        lanes = {stream.lane: figures[stream.name] for stream in model.streams}
        names = {stream.lane: stream.name for stream in (*model.streams, job.others[0])}
        records.append(
            {
                "lanes": lanes,
                "floor": figures[FLOOR],
                "layers": [
                    {"layer": layer["layer"]} | {lane: layer[name] for lane, name in names.items()}
                    for layer in layers
                ],
                "receipt": _receipt(setting, job, number, index_topk, hashes),
            }
        )
    if len(records) > 1:
        for number, record in enumerate(records):
            record["paired"] = _pairs(records, number, seed)
    return records


def _pairs(records: Sequence[dict], number: int, seed: int) -> list[dict]:
    """One candidate against each of the others, lane by lane."""
    mine = records[number]["lanes"]
    return [
        {"lane": lane, "other": other["receipt"]["checkpoint"]["name"]}
        | paired(figures["per_window"], other["lanes"][lane]["per_window"], seed=seed)
        for place, other in enumerate(records)
        if place != number
        for lane, figures in mine.items()
    ]


def _receipt(
    setting: _Setting, job: Job, number: int, index_topk: int | None, hashes: receipts.FileHashes
) -> dict:
    candidate, reference = setting.sources[number], setting.sources[0]
    data = receipts.describe_data(job.corpus)
    suffix = f"-{number}" if len(setting.sources) > 2 else ""
    receipt = {
        "id": setting.id + suffix,
        "method": receipts.METHOD,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": {"name": candidate.folder.resolve().name, "files": hashes.of(candidate)},
        "reference": {"name": reference.folder.resolve().name, "files": hashes.of(reference)},
        "data": data,
        "context": setting.request.context,
        "index_topk": index_topk,
        "seed": setting.request.seed,
        "lanes": list(setting.request.lanes),
        "input_scale": setting.request.scales_of,
        "arithmetic": {"reference": "float32", "candidate": dtype_name(setting.dtype)},
        "device": setting.device.type,
        "machine": platform.machine(),
        "versions": receipts.versions(),
        "calibration_overlap": receipts.calibration_overlap(candidate.folder, data),
        "memory_budget_bytes": job.memory.host_budget,
    }
    return receipt | {"comparable": receipts.comparable_key(receipt)}
