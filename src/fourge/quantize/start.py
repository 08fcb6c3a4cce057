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

import psutil
import torch

from fourge.calibrate.activations import make_batches
from fourge.calibrate.corpus import Corpus, build_corpus
from fourge.calibrate.sources import identify_data
from fourge.checkpoint.header import read_checkpoint
from fourge.checkpoint.writer import write_json
from fourge.errors import BudgetError, CheckpointError, OutputError
from fourge.formats import kernels
from fourge.formats.nvfp4 import weight_scale_2
from fourge.models.footprint import Load
from fourge.quantize.budget import (
    TYPICAL_GPU_BASE_BYTES,
    Budget,
    Workload,
    default_host_budget,
    default_workers,
)
from fourge.quantize.layer import Job
from fourge.quantize.plan import make_plan
from fourge.quantize.progress import OnProgress, peak_resident
from fourge.quantize.recipe import Recipe, to_dict
from fourge.quantize.resume import (
    OWN_FOLDER,
    check_input,
    check_places,
    check_target,
    fingerprint,
    finished_run,
    locked,
    own_folders,
    remove_work,
    store_input,
    work_folder,
)
from fourge.quantize.run import quantize
from fourge.quantize.survey import Source, survey

# Resident memory that threads, stacks and the allocator add once the run is under way.
SETTLING_BYTES = 64 << 20
# Part of the free device memory that is used when no budget is given.
DEVICE_SHARE = 0.9

CPU_FLAGS = Path("/proc/cpuinfo")

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
    arithmetic = f"{device.type} {str(dtype).removeprefix('torch.')}"
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
        plan = make_plan(source, request.recipe, workload, _budget(request, device, dtype))
        store_input(request.out, mine, request.work)
        job = Job(plan, corpus, mine, request.out, own, work, device, dtype, began)
        return Outcome(_run(job, on_progress), was_finished=False)


def _run(job: Job, on_progress: OnProgress) -> dict:
    try:
        return quantize(job, on_progress)
    except torch.OutOfMemoryError as error:
        raise BudgetError(
            f"the GPU ran out of memory ({str(error).splitlines()[0]}); finished layers are kept:"
            " run the same command with a smaller --device-memory, or free the GPU of others."
        ) from error


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


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one. BudgetError if a GPU is asked for and there is none."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise BudgetError(
            "--device cuda was asked for, but torch finds no CUDA device: install a CUDA build of"
            " torch, or use --device cpu."
        )
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is BF16, as engines compute, wherever the hardware multiplies it; else FP32."""
    if name == "float32":
        return torch.float32
    if name == "bfloat16" or device.type == "cuda":
        return torch.bfloat16
    flags = CPU_FLAGS.read_text()
    native = any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if native else torch.float32


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


def _budget(request: Request, device: torch.device, dtype: torch.dtype) -> Budget:
    """Limits, and what the process holds by now, kernels compiled."""
    _warm_up(device, dtype)
    host = request.memory or default_host_budget()
    resident = psutil.Process().memory_info().rss + SETTLING_BYTES
    held = {"peak": peak_resident(), "itemsize": dtype.itemsize}
    if device.type == "cpu":
        return Budget(host, base=resident, **held)
    free, total = torch.cuda.mem_get_info(device)
    limit = request.device_memory or request.memory or free
    limit = min(limit, int(free * DEVICE_SHARE))
    # Beyond the plan's estimate torch gives cached blocks back, and at this bound it refuses.
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    # CUDA libraries are loaded as the first layer needs them, so what is held now says too little.
    return Budget(host, base=max(resident, TYPICAL_GPU_BASE_BYTES), device=limit, **held)


def _warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Compile kernels and start thread pools, so that their memory is counted."""
    weights = torch.ones(16, 64, dtype=torch.bfloat16, device=device)
    kernels.quantize(weights, weight_scale_2(kernels.amax(weights)))
    square = torch.ones(256, 256, dtype=dtype, device=device)
    torch.mm(square, square)
