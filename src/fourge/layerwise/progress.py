"""Where a run is: counters that the layer loop advances, and snapshots for whoever shows them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One moment of a run. Bytes and tokens count this process alone, not what it resumed from."""

    stage: str
    layers_done: int
    layers: int
    fraction: float  # of the work that was left at the start
    tokens: int
    bytes_read: int
    bytes_written: int
    resident: int
    device: int  # bytes held on the GPU; 0 on the CPU
    budget: int
    elapsed_s: float
    remaining_s: float | None  # None until there is something to extrapolate from


OnProgress = Callable[[Snapshot], None]

# Snapshots come at most this often; the end of a stage is always told.
INTERVAL_S = 0.2


class Progress:
    """Advances a snapshot and passes it on."""

    def __init__(
        self, *, layers: int, budget: int, device_bytes: Callable[[], int], notify: OnProgress
    ) -> None:
        self._notify = notify
        self._device_bytes = device_bytes
        self._began = time.monotonic()
        self._work_began = self._began
        self._told = 0.0
        self._work = 1.0
        self._now = Snapshot(
            stage="start", layers_done=0, layers=layers, fraction=0.0, tokens=0, bytes_read=0,
            bytes_written=0, resident=0, device=0, budget=budget, elapsed_s=0.0, remaining_s=None,
        )  # fmt: skip

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    def stage(self, title: str, *, layers_done: int) -> None:
        """A new stage begins."""
        self._now = replace(self._now, stage=title, layers_done=layers_done)
        self._tell(always=True)

    def begin(self, work: float) -> None:
        """That much work, in any unit, lies ahead; from here on time is extrapolated."""
        self._work = work
        self._work_began = time.monotonic()

    def advance(
        self, *, work: float = 0.0, tokens: int = 0, read: int = 0, written: int = 0
    ) -> None:
        """Add to the counters."""
        now = self._now
        self._now = replace(
            now,
            fraction=min(1.0, now.fraction + work / self._work),
            tokens=now.tokens + tokens,
            bytes_read=now.bytes_read + read,
            bytes_written=now.bytes_written + written,
        )
        self._tell()

    def _tell(self, *, always: bool = False) -> None:
        clock = time.monotonic()
        if not always and clock - self._told < INTERVAL_S:
            return
        self._told = clock
        fraction = self._now.fraction
        spent = clock - self._work_began
        self._now = replace(
            self._now,
            resident=psutil.Process().memory_info().rss,
            device=self._device_bytes(),
            elapsed_s=self.elapsed_s,
            remaining_s=spent * (1 - fraction) / fraction if fraction > 0 else None,
        )
        self._notify(self._now)


def peak_resident() -> int:
    """Largest resident memory of this process so far, in bytes (VmHWM of Linux's proc).

    ``ru_maxrss`` would not do: a process inherits it from whoever started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no VmHWM line")
