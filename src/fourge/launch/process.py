"""An engine as a child: started in a group of its own, followed by its log, stopped as a whole.

Engines are trees of processes (one per GPU and more); a signal to the first one alone leaves GPU
memory taken. The group is asked to end (SIGINT, then SIGTERM) and is killed if it does not.
"""

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx2

from fourge.errors import LaunchError

LAST_LINES = 15
POLL_S = 0.25
# Seconds that the group is given after each signal.
PATIENCE_S = ((signal.SIGINT, 30.0), (signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0))

# What a line of an engine's log tells a person, {0} being the pattern's first group.
PHASES = (
    (re.compile(r"checkpoint shards:\s+(\d+)%"), "loading weights, {0} %"),
    (re.compile(r"Load weight begin"), "loading weights"),
    (re.compile(r"Model loading took ([\d.]+ ?Gi?B)"), "weights loaded, {0} per GPU"),
    (re.compile(r"Load weight end.*?mem usage=([\d.]+ ?GB)"), "weights loaded, {0} per GPU"),
    (re.compile(r"torch\.compile|Compiling a graph|Dynamo bytecode"), "compiling"),
    (re.compile(r"Available KV cache memory: ([\d.]+ ?GiB)"), "{0} for the KV cache"),
    (re.compile(r"GPU KV cache size: ([\d,]+) tokens"), "KV cache of {0} tokens"),
    (re.compile(r"KV Cache is allocated.*?#tokens: (\d+)"), "KV cache of {0} tokens"),
    (re.compile(r"Capturing CUDA graph|Capture cuda graph begin"), "capturing CUDA graphs"),
    (re.compile(r"Application startup complete|ready to roll"), "ready"),
)


def describe(line: str) -> str | None:
    """What a line of the log says, for people; None if it is a detail."""
    for pattern, text in PHASES:
        match = pattern.search(line)
        if match is not None:
            return text.format(*match.groups())
    return None


class EngineProcess:
    """A running engine; guards that its whole group ends. Use it in a ``with``."""

    def __init__(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        on_phase: Callable[[str], None],
    ) -> None:
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._on_phase = on_phase
        self._log = log
        try:
            self._child = subprocess.Popen(
                list(words),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(
                f"--run: {words[0]} does not start ({error.strerror}); activate the environment of"
                " the engine, or put its bin folder on PATH."
            ) from None
        self._reader = threading.Thread(target=self._follow, daemon=True)
        self._reader.start()

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _follow(self) -> None:
        """Copy the output to the log and tell each phase once."""
        told: str | None = None
        assert self._child.stdout is not None
        with self._log.open("wb") as copy, self._child.stdout as output:
            for raw in output:
                copy.write(raw)
                copy.flush()
                # A progress bar is one line with many carriage returns.
                for part in raw.decode("utf-8", "replace").splitlines():
                    self._last.append(part)
                    phase = describe(part)
                    if phase is not None and phase != told:
                        told = phase
                        self._on_phase(phase)

    def wait_healthy(self, url: str, timeout_s: float) -> float:
        """Wait until ``url`` answers with 200; the seconds that it took.

        Raises LaunchError if the engine ends before, or the time is over.
        """
        start = time.monotonic()
        with httpx2.Client(timeout=5, trust_env=False) as client:
            while time.monotonic() - start < timeout_s:
                if self._child.poll() is not None:
                    raise LaunchError(self._ended())
                with contextlib.suppress(httpx2.HTTPError):
                    if client.get(url).status_code == httpx2.codes.OK:
                        return time.monotonic() - start
                time.sleep(POLL_S)
        raise LaunchError(
            f"the engine did not answer {url} within {timeout_s:g} s; its log is {self._log}."
        )

    def wait(self) -> int:
        """Wait for the engine to end by itself; its exit status."""
        return self._child.wait()

    def _ended(self) -> str:
        self._reader.join(timeout=2)
        tail = "\n  ".join(self._last)
        return (
            f"the engine ended with status {self._child.returncode} before it answered; its log is"
            f" {self._log}, and ends:\n  {tail}\nCorrect what it complains about"
        )

    def stop(self) -> None:
        """End the whole group: ask, ask harder, kill."""
        for number, patience in PATIENCE_S:
            if not self._signal(number):
                break
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline and self._is_there():
                time.sleep(0.05)
        self._child.wait()
        self._reader.join(timeout=5)

    def _is_there(self) -> bool:
        """Whether any process of the group is left."""
        self._child.poll()  # or the first one would stay as a zombie
        return self._signal(0)

    def _signal(self, number: int) -> bool:
        """Send to the group; False if nobody is left in it."""
        try:
            os.killpg(self._child.pid, number)
        except ProcessLookupError:
            return False
        return True
