"""fourge in a fresh interpreter, watched from outside: how much memory it really takes; for tests.

The peak is VmHWM of /proc/PID/status, looked at while the process runs; ru_maxrss would carry over
from the process that forked it.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

MIB = 1 << 20


class Watched(NamedTuple):
    """How a process ended."""

    status: int
    stdout: str
    stderr: str
    peak: int  # bytes


def run_watched(*arguments: object) -> Watched:
    """Run fourge in a new interpreter and watch its resident memory."""
    command = [sys.executable, "-m", "fourge.cli.main", *map(str, arguments)]
    peak = 0
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        with subprocess.Popen(command, stdout=stdout, stderr=stderr) as process:
            while process.poll() is None:
                peak = max(peak, high_water(process.pid))
                time.sleep(0.005)
        stdout.seek(0)
        stderr.seek(0)
        return Watched(process.returncode, stdout.read(), stderr.read(), peak)


def high_water(pid: int) -> int:
    """VmHWM in bytes; 0 when the process is gone."""
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def smallest_memory(*arguments: object) -> int:
    """What fourge, given these arguments and too little memory, says that it needs, in bytes."""
    result = run_watched(*arguments, "--memory", "100MiB")
    assert result.status == 2, result.stderr
    units = {"MiB": MIB, "GiB": 1024 * MIB}
    sizes = re.findall(r"([\d.]+) ?(MiB|GiB)", result.stderr.splitlines()[-1])
    return max(int(float(number) * units[unit]) for number, unit in sizes)


@contextmanager
def roomy_folder(fallback: Path, *, needed: int) -> Iterator[Path]:
    """A folder in memory if ``needed`` bytes are free there, else ``fallback``: a run would wait
    for the disk to take the files.
    """
    shared = Path("/dev/shm")
    if not shared.is_dir() or shutil.disk_usage(shared).free < needed:
        yield fallback
        return
    with tempfile.TemporaryDirectory(dir=shared, prefix="fourge-test-") as folder:
        yield Path(folder)
