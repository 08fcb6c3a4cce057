"""The run: embedding, layer after layer, what goes over unchanged, records.

    for layer in what is not done:      (layer.py)
        read it, run all tokens through it once, write it quantized, commit it
Killed anywhere, the same call goes on from the last committed layer: resume.py says how.
Memory: what plan.memory says; budget.py has the sum.
"""

import json
import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numba
import numpy as np
import torch

from fourge import __version__
from fourge.calibrate.observe import LayerStatistics
from fourge.calibrate.routing import Coverage, layer_record, saturation, summarize
from fourge.checkpoint.header import INDEX_NAME, TensorInfo, read_checkpoint
from fourge.checkpoint.metadata import (
    CONFIG_NAME,
    HF_QUANT_CONFIG_NAME,
    copy_files,
    write_metadata,
)
from fourge.checkpoint.source import FileReader, TensorStream
from fourge.checkpoint.writer import PARTIAL_SUFFIX, ShardPlan, is_written, write_index, write_json
from fourge.doctor import record as doctor_record
from fourge.doctor.examine import Report, examine, look_at
from fourge.doctor.experts import Depth
from fourge.errors import OutputError
from fourge.layerwise.activations import Batch, hidden_file, make_batches
from fourge.layerwise.budget import STAGING_BYTES
from fourge.layerwise.embedding import look_up, pieces_of
from fourge.layerwise.folders import check_space, remove_partial
from fourge.layerwise.machine import device_bytes, dtype_name, measure
from fourge.layerwise.progress import OnProgress, Progress
from fourge.models import layer as model
from fourge.quantize.layer import Job, Target, run_layer
from fourge.quantize.plan import CopyPlan, describe, describe_resources, disk_bytes
from fourge.quantize.recipe import NEEDS
from fourge.quantize.resume import RUN_NAME
from fourge.quantize.writers import LayerWriter, open_writers


@torch.no_grad()
def quantize(job: Job, on_progress: OnProgress) -> list[dict]:
    """Make the checkpoints of ``job``, or what is left of them, and return the records of the run,
    one for each target.

    Raises FourgeError subclasses; whatever was committed stays and is not done again.
    """
    layers = job.plan.layout.layers
    for folder in (*(target.own / "statistics" for target in job.targets), job.work):
        folder.mkdir(parents=True, exist_ok=True)
    remove_partial(_written_files(job))
    _check_space(job)
    progress = Progress(
        layers=len(layers),
        budget=job.plan.memory.host_budget,
        device_bytes=device_bytes,
        notify=on_progress,
    )
    lengths, pass_of = job.corpus.lengths.tolist(), job.corpus.pass_of.tolist()
    batches = make_batches(lengths, pass_of, batch_tokens=job.plan.recipe.batch_tokens)
    progress.begin(_work_left(job))
    with FileReader(job.plan.source.folder) as files:
        if not _is_done(job, job.plan.layout.embedding.shards):
            progress.stage("embedding", layers_done=0)
            _embed(job, files, batches, progress)
        _run_layers(job, batches, progress)
        for copy in job.plan.layout.tail:
            if not _is_done(job, copy.shards):
                progress.stage(copy.title, layers_done=len(layers))
                _copy(job, files, copy, progress)
    progress.stage("closing", layers_done=len(layers))
    return [_finish(job, target, progress) for target in job.targets]


def _written_files(job: Job) -> Iterator[Path]:
    """Every file that a run of this job may have been writing when it was interrupted."""
    names = [shard.file for shard in job.plan.layout.shards]
    names += [CONFIG_NAME, HF_QUANT_CONFIG_NAME, INDEX_NAME]
    names += map(str, job.plan.source.other_files)
    yield from (out / name for out in job.outs for name in names)
    own = [folder for one in job.targets for folder in (one.own, one.own / "statistics")]
    for folder in (*own, job.work):
        yield from (path.with_suffix("") for path in folder.glob(f"*{PARTIAL_SUFFIX}"))


def _is_done(job: Job, shards: tuple[ShardPlan, ...]) -> bool:
    return all(is_written(out, shard) for out in job.outs for shard in shards)


def _work_left(job: Job) -> int:
    """In bytes of the source that are still to be read; a fair measure where layers dominate."""
    layout = job.plan.layout
    layers = sum(one.source_bytes for one in layout.layers if not _is_done(job, one.shards))
    copies = [one for one in (layout.embedding, *layout.tail) if not _is_done(job, one.shards)]
    return max(1, layers + sum(info.nbytes for one in copies for info in one.tensors))


def _check_space(job: Job) -> None:
    output, work = disk_bytes(job.plan)
    if all(_is_done(job, layer.shards) for layer in job.plan.layout.layers):
        work = 0
    shards = job.plan.layout.shards
    kept = sum(path.stat().st_blocks * 512 for path in job.work.glob("*.bin"))
    needed = [(job.work, max(0, work - kept))]
    for out in job.outs:
        written = sum(shard.nbytes for shard in shards if is_written(out, shard))
        needed.append((out, output - written))
    check_space(needed)


def _run_layers(job: Job, batches: list[Batch], progress: Progress) -> None:
    layers = job.plan.layout.layers
    remaining = [layer for layer in layers if not _is_done(job, layer.shards)]
    if not remaining:
        return
    if remaining != list(layers[remaining[0].layer :]):
        raise OutputError(
            f"{job.outs[0]} has shards of later layers but not of layer {remaining[0].layer}: it"
            " was changed from outside; remove the folder and start again."
        )
    rope = model.rope_table(job.plan.source.config, int(job.corpus.lengths.max()), job.device)
    groups = [group.tensors for layer in remaining for group in layer.groups]
    stream = iter(
        TensorStream(job.plan.source.folder, groups, device=job.device, staging_bytes=STAGING_BYTES)
    )
    for layer in remaining:
        progress.stage(f"layer {layer.layer}", layers_done=layer.layer)
        run_layer(job, layer, stream, batches, rope, progress)


def _embed(job: Job, files: FileReader, batches: list[Batch], progress: Progress) -> None:
    """Copy the embedding and look every token up, both from one reading of the table."""
    copy, config = job.plan.layout.embedding, job.plan.source.config
    hidden = hidden_file(job.work, config, 0).create()
    try:
        with open_writers(job.outs, copy.shards) as writers:
            pieces = _copy_pieces(files, copy.tensors, writers, progress)
            look_up(pieces, job.corpus.tokens, config, batches, [hidden])
            hidden.commit()
            for writer in writers:
                writer.commit()
    finally:
        hidden.close()


def _copy(job: Job, files: FileReader, copy: CopyPlan, progress: Progress) -> None:
    with open_writers(job.outs, copy.shards) as writers:
        for _ in _copy_pieces(files, copy.tensors, writers, progress):
            pass
        for writer in writers:
            writer.commit()


def _copy_pieces(
    files: FileReader,
    tensors: Sequence[TensorInfo],
    writers: Sequence[LayerWriter],
    progress: Progress,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Copy tensors through one buffer, and yield (first row, rows) of every piece on its way."""
    for info, first, rows in pieces_of(files, tensors):
        for writer in writers:
            writer.write(info.name, rows, first * rows.shape[1] * rows.dtype.itemsize)
        written = rows.nbytes * len(writers)
        progress.advance(work=rows.nbytes, read=rows.nbytes, written=written)
        yield first, rows


def _finish(job: Job, target: Target, progress: Progress) -> dict:
    """Everything that is not a shard, the doctor's word on it, and run.json last."""
    source, layout = job.plan.source, job.plan.layout
    write_index(target.out, layout.shards)
    _verify(job, target)
    copy_files(source.folder, target.out, source.other_files)
    coverage = _write_coverage(job, target)
    write_metadata(target.out, layout.config_text, list(layout.excluded))
    report = _examine(job, target, progress)
    record = _record(job, target, coverage, report)
    write_json(target.own / RUN_NAME, record)
    return record


def _verify(job: Job, target: Target) -> None:
    """Read the written headers back: every planned tensor is there, and nothing else."""
    written = read_checkpoint(target.out).tensors
    planned = {name for shard in job.plan.layout.shards for name in shard.sizes}
    assert set(written) == planned, "the written checkpoint differs from the plan"


def _examine(job: Job, target: Target, progress: Progress) -> Report:
    """All of the doctor's rules that need no source, over every byte of the output."""
    stages: list[str] = []

    def tell(stage: str, done: int, total: int) -> None:
        if stages[-1:] != [stage]:
            stages.append(stage)
            progress.stage(f"doctor, {stage}", layers_done=len(job.plan.layout.layers))
        progress.advance()

    evidence = look_at(target.out, source=None)
    report = examine(evidence, Depth(memory=STAGING_BYTES), tell)
    write_json(target.own / doctor_record.RECORD_NAME, doctor_record.describe(report, evidence))
    return report


def _write_coverage(job: Job, target: Target) -> Coverage:
    layers = [
        layer_record(
            layer.layer,
            job.corpus.passes,
            LayerStatistics.load(target.statistics_path(layer.layer)),
        )
        for layer in job.plan.layout.layers
        if layer.is_sparse
    ]
    coverage = summarize(layers)
    document = {
        "passes": list(job.corpus.passes),
        "summary": coverage._asdict(),
        "saturation": saturation(layers, len(job.corpus.tokens)),
        "layers": layers,
    }
    write_json(target.own / "coverage.json", document)
    return coverage


def _record(job: Job, target: Target, coverage: Coverage, report: Report) -> dict:
    """``fourge/run.json``. Everything that differs between two runs of one input is in "timing"."""
    plan = job.plan
    return {
        "finished": True,
        "fourge": __version__,
        "fingerprint": target.fingerprint,
        "plan": describe(plan) | {"method": target.method},
        "data": job.corpus.record,
        "statistics": [
            target.statistics_path(layer.layer).relative_to(target.out).as_posix()
            for layer in plan.layout.layers
            if layer.is_sparse
        ],
        "coverage": coverage._asdict(),
        "method": {
            "asked": target.method,
            "needs": NEEDS[target.method],
            "experts": _chosen(job, target),
        },
        "input_scale": {
            "policy": plan.recipe.input_scale,
            "headroom": plan.recipe.input_headroom,
        },
        "doctor": [
            {"rule": one.rule, "severity": one.severity, "message": one.message}
            for one in report.findings
        ],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "numba": numba.__version__,
        },
        "timing": _timing(job),
    }


def _chosen(job: Job, target: Target) -> dict[str, int]:
    """How many experts each method won."""
    counts: Counter[str] = Counter()
    for layer in job.plan.layout.layers:
        if layer.is_sparse:
            counts.update(json.loads(target.choices_path(layer.layer).read_bytes())["chosen"])
    return dict(counts.most_common())


def _timing(job: Job) -> dict:
    """Sums and peaks over all processes that took part, as far as their work was kept."""
    layers = [
        {"layer": layer.layer, **json.loads(job.timing_path(layer.layer).read_bytes())}
        for layer in job.plan.layout.layers
    ]
    now = measure(time.monotonic() - job.began)
    return {
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": str(job.device),
        "dtype": dtype_name(job.dtype),
        "machine": platform.machine(),
        "seconds_of_layers": round(sum(layer["seconds"] for layer in layers), 3),
        "seconds_of_last_process": now["seconds"],
        "peak_resident_bytes": max(one["peak_resident_bytes"] for one in [*layers, now]),
        "peak_device_bytes": max(one["peak_device_bytes"] for one in [*layers, now]),
        **describe_resources(job.plan),
        "layers": layers,
    }
