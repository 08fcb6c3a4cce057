"""From a request to a finished checkpoint: validate, lock, gather tokens, plan, run.

What can be known to fail fails early, cheapest first: places, headers, whose folder it is, then
the data; the smallest budget depends on the tokens, so it is known after them, and they are kept.
Heavy imports are at home here; the torch-free part of planning is plan.py.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from fourge.calibrate.corpus import Corpus, build_corpus
from fourge.calibrate.sources import identify_data
from fourge.checkpoint.header import read_checkpoint
from fourge.checkpoint.writer import write_json
from fourge.errors import CheckpointError, OutputError
from fourge.layerwise.activations import make_batches
from fourge.layerwise.budget import default_workers
from fourge.layerwise.folders import OWN_FOLDER, locked, own_folders
from fourge.layerwise.machine import (
    choose_device,
    choose_dtype,
    dtype_name,
    measure_budget,
    out_of_device_memory,
)
from fourge.layerwise.progress import OnProgress
from fourge.models.footprint import Load
from fourge.models.survey import Source, survey
from fourge.quantize.layer import Job
from fourge.quantize.memory import Workload
from fourge.quantize.plan import make_plan
from fourge.quantize.recipe import Recipe, to_dict
from fourge.quantize.resume import (
    check_input,
    check_places,
    check_target,
    fingerprint,
    finished_run,
    remove_work,
    store_input,
    work_folder,
)
from fourge.quantize.run import quantize

OnData = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Request:
    """What the user asked for; memory in bytes, None for what the machine has free."""

    source: Path
    out: Path
    recipe: Recipe
    device: str = "auto"
    dtype: str = "auto"
    memory: int | None = None
    device_memory: int | None = None
    work: Path | None = None


class Outcome(NamedTuple):
    """The record of the run (``fourge/run.json``), and whether there was nothing left to do."""

    record: dict
    was_finished: bool


def run_request(request: Request, *, on_data: OnData, on_progress: OnProgress) -> Outcome:
    """Do all of it, or what is left of it.

    A finished output with the same input is left alone. Raises FourgeError.
    """
    began = time.monotonic()
    check_places(request.source, request.out, request.work)
    check_target(request.out)
    source = survey(request.source, mtp=request.recipe.mtp)
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype, device)
    data = {spec.name: identify_data(spec.data) for spec in request.recipe.passes}
    arithmetic = f"{device.type} {dtype_name(dtype)}"
    mine = fingerprint(source, to_dict(request.recipe), data, arithmetic)
    check_input(request.out, mine, request.work)
    own, work = request.out / OWN_FOLDER, work_folder(request.out, request.work, mine)
    if (done := _finished(request.out, work)) is not None:
        return done
    with own_folders(own, work), locked(own), locked(work):
        # Again, now that nobody else can be at it: another process may have been quicker.
        check_input(request.out, mine, request.work)
        if (done := _finished(request.out, work)) is not None:
            return done
        corpus = _corpus(source, request.recipe, work, mine, on_data)
        workload = measure_workload(corpus, request.recipe)
        budget = measure_budget(
            device,
            memory=request.memory,
            device_memory=request.device_memory,
            itemsize=dtype.itemsize,
        )
        plan = make_plan(source, request.recipe, workload, budget)
        store_input(request.out, mine, request.work)
        job = Job(plan, corpus, mine, request.out, own, work, device, dtype, began)
        return Outcome(_run(job, on_progress), was_finished=False)


def _run(job: Job, on_progress: OnProgress) -> dict:
    try:
        return quantize(job, on_progress)
    except torch.OutOfMemoryError as error:
        raise out_of_device_memory(error) from error


def _finished(out: Path, work: Path) -> Outcome | None:
    """What there is to say of a finished output, if it is whole; what a kill at its end may have
    left is removed.
    """
    record = finished_run(out)
    if record is None:
        return None
    try:
        read_checkpoint(out)
    except CheckpointError as error:
        raise OutputError(
            f"{out} was finished but is no longer whole: {error} Restore it, or remove the folder"
            " and run the same command again."
        ) from None
    remove_work(out, work)
    return Outcome(record, was_finished=True)


def measure_workload(corpus: Corpus, recipe: Recipe) -> Workload:
    """How large the pieces are in which this corpus is computed."""
    lengths = corpus.lengths.tolist()
    batches = make_batches(lengths, corpus.pass_of.tolist(), batch_tokens=recipe.batch_tokens)
    load = Load(max(batch.tokens for batch in batches), max(lengths))
    return Workload(sum(lengths), len(corpus.passes), load, default_workers())


def _corpus(source: Source, recipe: Recipe, work: Path, mine: dict, on_data: OnData) -> Corpus:
    """The tokens that an earlier run kept for the same input, else new ones, kept from now on."""
    kept_for = work / "input.json"
    if kept_for.exists() and json.loads(kept_for.read_bytes()) == mine:
        return Corpus.load(work)
    corpus = build_corpus(
        recipe.passes,
        checkpoint=source.folder,
        vocab_size=source.config.vocab_size,
        max_bad_share=recipe.max_bad_share,
        on_progress=on_data,
    )
    kept_for.unlink(missing_ok=True)
    corpus.save(work)
    write_json(kept_for, mine)
    return corpus
