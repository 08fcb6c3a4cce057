"""From a request to a finished checkpoint: validate, lock, gather tokens, plan, run.

What can be known to fail fails early, cheapest first: places, headers, whose folder it is, then
the data; the smallest budget depends on the tokens, so it is known after them, and they are kept.
Heavy imports are at home here; the torch-free part of planning is plan.py.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from fourge.calibrate.corpus import Corpus, build_corpus
from fourge.calibrate.sources import identify_data
from fourge.checkpoint.header import read_checkpoint
from fourge.checkpoint.writer import write_json
from fourge.errors import CheckpointError, OutputError
from fourge.layerwise.activations import make_batches
from fourge.layerwise.folders import locked, own_folders
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
from fourge.quantize.fitting import Fitting, workers_for
from fourge.quantize.layer import Job, Target
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
    places = ((request.recipe.method, request.out),)
    return run_places(request, places, on_data=on_data, on_progress=on_progress)[0]


def run_places(
    request: Request,
    places: Sequence[tuple[str, Path]],
    *,
    on_data: OnData,
    on_progress: OnProgress,
) -> list[Outcome]:
    """The same for several methods, each with a folder of its own in place of ``request.out``: one
    calibration, of which all of them see the same.
    """
    began = time.monotonic()
    for _, out in places:
        check_places(request.source, out, request.work)
        check_target(out)
    source = survey(request.source, mtp=request.recipe.mtp)
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype, device)
    targets = _targets(request, places, source, f"{device.type} {dtype_name(dtype)}")
    work = work_folder(places[0][1], request.work, [target.fingerprint for target in targets])
    done = _finished(targets, request.work)
    if len(done) < len(targets):
        folders = [*(target.own for target in targets), work]
        with ExitStack() as stack:
            stack.enter_context(own_folders(*folders))
            for folder in folders:
                stack.enter_context(locked(folder))
            # Again, now that nobody else can be at it: another process may have been quicker.
            done = _finished(targets, request.work)
            left = tuple(target for target in targets if target.out not in done)
            if left:
                job = _prepare(request, source, left, (device, dtype), work, began, on_data)
                for target, record in zip(left, _run(job, on_progress), strict=True):
                    done[target.out] = Outcome(record, was_finished=False)
    for target in targets:
        remove_work(target.out, work)
    return [done[target.out] for target in targets]


def _targets(
    request: Request, places: Sequence[tuple[str, Path]], source: Source, arithmetic: str
) -> tuple[Target, ...]:
    data = {spec.name: identify_data(spec.data) for spec in request.recipe.passes}
    targets = []
    for method, out in places:
        recipe = to_dict(replace(request.recipe, method=method))
        targets.append(Target(method, out, fingerprint(source, recipe, data, arithmetic)))
    return tuple(targets)


def _prepare(
    request: Request, source: Source, targets: tuple[Target, ...],
    machine: tuple[torch.device, torch.dtype], work: Path, began: float, on_data: OnData,
) -> Job:  # fmt: skip
    """Gather the tokens and plan; from then on the targets belong to this input."""
    device, dtype = machine
    corpus = _corpus(source, request.recipe, work, targets[0].fingerprint, on_data)
    methods = tuple(target.method for target in targets)
    workload = measure_workload(corpus, request.recipe, methods, on_device=device.type != "cpu")
    budget = measure_budget(
        device,
        memory=request.memory,
        device_memory=request.device_memory,
        itemsize=dtype.itemsize,
    )
    plan = make_plan(source, request.recipe, workload, budget)
    for target in targets:
        store_input(target.out, target.fingerprint, request.work)
    return Job(plan, corpus, targets, work, device, dtype, began)


def _run(job: Job, on_progress: OnProgress) -> list[dict]:
    try:
        return quantize(job, on_progress)
    except torch.OutOfMemoryError as error:
        raise out_of_device_memory(error) from error


def _finished(targets: Sequence[Target], chosen_work: Path | None) -> dict[Path, Outcome]:
    """The targets that are finished and whole, by folder. OutputError if one has other input."""
    found = {}
    for target in targets:
        check_input(target.out, target.fingerprint, chosen_work)
        record = finished_run(target.out)
        if record is None:
            continue
        try:
            read_checkpoint(target.out)
        except CheckpointError as error:
            raise OutputError(
                f"{target.out} was finished but is no longer whole: {error} Restore it, or remove"
                " the folder and run the same command again."
            ) from None
        found[target.out] = Outcome(record, was_finished=True)
    return found


def measure_workload(
    corpus: Corpus, recipe: Recipe, methods: tuple[str, ...], *, on_device: bool
) -> Workload:
    """How large the pieces are in which this corpus is computed."""
    lengths = corpus.lengths.tolist()
    batches = make_batches(lengths, corpus.pass_of.tolist(), batch_tokens=recipe.batch_tokens)
    load = Load(max(batch.tokens for batch in batches), max(lengths))
    workers = workers_for(methods, on_device=on_device)
    return Workload(sum(lengths), len(corpus.passes), load, workers, Fitting(methods))


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
