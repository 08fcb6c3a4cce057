"""From a request to a finished checkpoint: validate, gather tokens, plan, lock, run.

Everything that can be known to fail is made to fail before the first long step, cheapest first:
recipe and headers, then data, then budgets, then the run. Heavy imports are at home here; the
torch-free part of planning is plan.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from fourge.calibrate.activations import make_batches
from fourge.calibrate.corpus import RECORD_FILE, Corpus, build_corpus
from fourge.calibrate.sources import identify_data
from fourge.checkpoint.header import read_checkpoint
from fourge.errors import BudgetError, CheckpointError, OutputError
from fourge.formats import kernels
from fourge.formats.nvfp4 import weight_scale_2
from fourge.models.footprint import Load
from fourge.quantize.budget import Budget, Workload, default_host_budget, default_workers
from fourge.quantize.layer import Job
from fourge.quantize.plan import Source, make_plan, survey
from fourge.quantize.progress import OnProgress, peak_resident
from fourge.quantize.recipe import Recipe, to_dict
from fourge.quantize.resume import (
    OWN_FOLDER,
    check_fingerprint,
    check_target,
    fingerprint,
    finished_run,
    locked,
    own_folders,
    remove_work,
    store_fingerprint,
    work_folder,
)
from fourge.quantize.run import quantize

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


def run_request(request: Request, *, on_data: OnData, on_progress: OnProgress) -> dict:
    """Do all of it and return the record of the run (``fourge/run.json``).

    A finished output with the same input is left alone and its record returned. Raises FourgeError.
    """
    source = survey(request.source, mtp=request.recipe.mtp)
    check_target(request.out, request.source)
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype, device)
    data = {spec.name: identify_data(spec.data) for spec in request.recipe.passes}
    identity = fingerprint(source, to_dict(request.recipe), data, str(dtype))
    work = work_folder(request.out, request.work, identity)
    check_fingerprint(request.out, identity)
    done = finished_run(request.out)
    if done is not None:
        return _check_finished(request.out, work, done)
    own = request.out / OWN_FOLDER
    with own_folders(own, work), locked(own), locked(work):
        check_fingerprint(request.out, identity)  # again: another process may have been quicker
        corpus = _corpus(source, request.recipe, work, on_data)
        workload = measure_workload(corpus, request.recipe)
        plan = make_plan(source, request.recipe, workload, _budget(request, device, dtype))
        store_fingerprint(request.out, identity)
        corpus.save(work)
        job = Job(plan, corpus, identity, request.out, own, work, device, dtype)
        return quantize(job, on_progress)


def _check_finished(out: Path, work: Path, record: dict) -> dict:
    """A finished output needs nothing more, if it is still whole."""
    try:
        read_checkpoint(out)
    except CheckpointError as error:
        raise OutputError(
            f"{out} was finished but is no longer whole: {error} Restore it, or remove the folder"
            " and run the same command again."
        ) from None
    remove_work(out, work)
    return record


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


def _corpus(source: Source, recipe: Recipe, work: Path, on_data: OnData) -> Corpus:
    """The tokens that an interrupted run kept, else new ones.

    The fingerprint has already told that recipe and data are the same.
    """
    if (work / RECORD_FILE).exists():
        return Corpus.load(work)
    return build_corpus(
        recipe.passes,
        checkpoint=source.folder,
        vocab_size=source.config.vocab_size,
        max_bad_share=recipe.max_bad_share,
        on_progress=on_data,
    )


def _budget(request: Request, device: torch.device, dtype: torch.dtype) -> Budget:
    """Limits, and what the process holds by now, kernels compiled."""
    _warm_up(device)
    host = request.memory or default_host_budget()
    resident = psutil.Process().memory_info().rss + SETTLING_BYTES
    held = {"base": resident, "peak": peak_resident(), "itemsize": dtype.itemsize}
    if device.type == "cpu":
        return Budget(host, **held)
    free, _ = torch.cuda.mem_get_info(device)
    limit = request.device_memory or request.memory or free
    limit = min(limit, int(free * DEVICE_SHARE))
    return Budget(host, device=limit, **held)


def _warm_up(device: torch.device) -> None:
    """Compile kernels and start thread pools, so that their memory is counted."""
    weights = torch.ones(16, 64, dtype=torch.bfloat16, device=device)
    kernels.quantize(weights, weight_scale_2(kernels.amax(weights)))
    torch.mm(torch.ones(256, 256, device=device), torch.ones(256, 256, device=device))
