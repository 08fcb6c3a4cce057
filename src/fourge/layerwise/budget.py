"""Whether a run fits: memory of host and device, and how much of a layer is read at a time.

Resident memory of the host, computing on the CPU:
    base + buffers + temporaries of one batch + 2 x the largest group of weights
Two groups, since one is read while the other computes. With a GPU the last two terms lie there.
Imports no torch.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from fourge.errors import BudgetError
from fourge.models.config import ModelConfig
from fourge.models.footprint import Load

# Resident memory of a process that has imported torch, numba and transformers and compiled the
# kernels: 330-420 MiB measured (torch 2.13 CPU). With a CUDA context: 820 MiB before the first
# layer and 1.4 to 1.6 GiB after it, when its libraries are loaded (torch 2.11, H100).
TYPICAL_BASE_BYTES = 448 << 20
TYPICAL_GPU_BASE_BYTES = 1664 << 20
# Unchanged tensors are copied through a buffer of this size, or of one row if that is longer.
COPY_BUFFER_BYTES = 32 << 20
# What torch holds on a GPU besides tensors: cuBLAS workspaces (32 MiB on Hopper) and the rest of
# segments of 2 and 20 MiB.
DEVICE_BASE_BYTES = 160 << 20
# Weights reach a GPU through a pinned buffer of this size.
STAGING_BYTES = 64 << 20
# What a process holds differs a little from run to run; the smallest budget that is named must
# work in the next one.
JITTER_BYTES = 16 << 20
MAX_WORKERS = 16
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CGROUP_STAT = Path("/sys/fs/cgroup/memory.stat")
CGROUP_CURRENT = Path("/sys/fs/cgroup/memory.current")


@dataclass(frozen=True)
class Budget:
    """Limits in bytes. ``base`` is what the process holds before any tensor is loaded, ``peak`` the
    most that it has held so far.
    """

    host: int
    base: int = TYPICAL_BASE_BYTES
    peak: int = 0
    device: int = 0  # 0: the CPU computes
    itemsize: int = 4  # bytes of the compute dtype; the larger one where it is not known yet

    @property
    def on_device(self) -> bool:
        return self.device > 0


@dataclass(frozen=True)
class Needs:
    """Bytes that a run holds besides weights, wherever the weights lie."""

    host: int  # buffers that are always there
    compute: int  # temporaries of one batch, and what goes with them to the device
    at_start: int  # buffers of the time before the first layer
    rows: int  # of one batch, in host memory on their way to and from a device


@dataclass(frozen=True)
class Pieces:
    """Bytes of weights: the largest layer, its largest indivisible part, the largest tensor."""

    layer: int
    indivisible: int
    tensor: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes: what the budgets are, what the run will hold, and the least it could do with.

    ``host`` counts the process's resident memory; ``device`` is 0 when computing on the CPU.
    """

    host_budget: int
    host: int
    smallest_host: int
    device_budget: int
    device: int
    smallest_device: int
    largest_group: int


def fit(pieces: Pieces, needs: Needs, budget: Budget) -> MemoryPlan:
    """Choose how many bytes of weights a group may have.

    Raises BudgetError, with the smallest budget that works, if even single experts do not fit.
    """
    at_start = max(budget.peak, budget.base + needs.at_start)
    if budget.on_device:
        compute = needs.compute + DEVICE_BASE_BYTES
        group = min(pieces.layer, (budget.device - compute) // 2)
        host = budget.base + needs.host + needs.rows + STAGING_BYTES + 2 * pieces.tensor
        host = smallest_host = max(host, at_start)
        device, smallest_device = compute + 2 * group, compute + 2 * pieces.indivisible
    else:
        fixed = budget.base + needs.host + needs.compute
        group = min(pieces.layer, (budget.host - fixed) // 2)
        host = max(fixed + 2 * group, at_start)
        smallest_host = max(fixed + 2 * pieces.indivisible, at_start)
        device = smallest_device = 0
    if budget.host < smallest_host:
        enough = smallest_host + JITTER_BYTES
        raise BudgetError(_too_little("host memory", "--memory", budget.host, enough))
    if budget.device < smallest_device:
        raise BudgetError(
            _too_little("device memory", "--device-memory", budget.device, smallest_device)
        )
    return MemoryPlan(
        budget.host, host, smallest_host, budget.device, device, smallest_device, group
    )


def default_host_budget() -> int:
    """Four fifths of the memory that is free."""
    return int(free_host_memory() * 0.8)


def free_host_memory() -> int:
    """Bytes that are free on this machine, or within its control group."""
    free = psutil.virtual_memory().available
    try:
        limit = int(CGROUP_LIMIT.read_text())
        stat = dict(line.split() for line in CGROUP_STAT.read_text().splitlines())
        # Page cache counts as used there, but is given up when memory is asked for.
        used = int(CGROUP_CURRENT.read_text()) - int(stat["inactive_file"])
        free = max(0, min(free, limit - used))
    except (OSError, ValueError, KeyError):
        pass  # no control group, or one without a limit ("max")
    return free


def default_workers() -> int:
    """Threads that pack and hash: one per core that this process may use."""
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)))


def embedding_bytes(config: ModelConfig, tokens: int, load: Load) -> int:
    """The rows of the embedding that occur, and one batch of them, while tokens are looked up."""
    rows = min(config.vocab_size, tokens) + 2 * load.batch_tokens
    return rows * config.hidden_size * 2 + tokens * 8


def _too_little(what: str, option: str, given: int, needed: int) -> str:
    enough = format_bytes(needed, up=True)
    return (
        f"{format_bytes(given)} of {what} is too little: this run needs at least {enough}. Give"
        f" {option} {enough.replace(' ', '')} or more, or shorter sequences and smaller batches."
    )


def format_bytes(count: float, *, up: bool = False) -> str:
    """``1.5 GiB``; with ``up``, never less than ``count``, so that it can be typed back."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            tenths = -(-count * 10 // size) if up else round(count * 10 / size)
            return f"{tenths / 10:.1f} {unit}"
    return f"{int(count)} B"
