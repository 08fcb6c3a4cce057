"""How a run looks while it runs: a live line on a terminal, plain lines elsewhere."""

import time

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from fourge.cli.show import duration
from fourge.layerwise.budget import format_bytes
from fourge.layerwise.progress import Snapshot

# Without a terminal, a line comes with every stage, and at most this often within one.
PLAIN_INTERVAL_S = 30.0


class RunDisplay:
    """Shows data passes and snapshots of a run. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, transient=True) if console.is_terminal else None
        self._stage = ""
        self._told = 0.0

    def __enter__(self) -> "RunDisplay":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, soft_wrap=True, markup=False)

    def data(self, name: str, found: int, asked: int) -> None:
        """Samples of a pass; asked 0: as many as there are."""
        line = f"data {name}: {found:,}{f' of {asked:,}' if asked else ''} samples"
        self._show(f"data {name}", line, found / asked if asked else 0.0)

    def scan(self, stage: str, done: int, total: int) -> None:
        """Bytes of a pass over tensors."""
        line = f"{stage}: {format_bytes(done)} of {format_bytes(total)}"
        self._show(stage, line, done / total if total else 1.0)

    def run(self, now: Snapshot) -> None:
        """One moment of the run."""
        parts = [
            f"{now.stage} ({now.layers_done} of {now.layers} layers done)",
            f"{now.tokens:,} tokens",
            f"read {format_bytes(now.bytes_read)}",
            f"written {format_bytes(now.bytes_written)}",
            f"memory {format_bytes(now.resident)} of {format_bytes(now.budget)}",
        ]
        if now.device:
            parts.append(f"GPU {format_bytes(now.device)}")
        if now.remaining_s is not None:
            parts.append(f"{duration(now.remaining_s)} left")
        self._show(now.stage, ", ".join(parts), now.fraction)

    def _show(self, stage: str, line: str, fraction: float) -> None:
        if self._live:
            grid = Table.grid(padding=(0, 1))
            grid.add_row(ProgressBar(total=1.0, completed=fraction, width=20), line)
            self._live.update(grid)
            return
        clock = time.monotonic()
        if stage != self._stage or clock - self._told >= PLAIN_INTERVAL_S:
            self._stage, self._told = stage, clock
            self.note(line)
