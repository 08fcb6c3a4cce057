"""fourge as a user runs it: whole processes, their exit status, their files; for tests.

``run_fresh`` starts ``python -m fourge.cli.main``. ``start`` and ``run`` do the same in a fork of
one server process that has imported fourge already, which saves 1.5 s a run; as a script, this file
is that server. A process can be told to kill itself at its n-th change of the file system.
"""

import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Audit events that come just before the file system changes (os.replace audits as os.rename).
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "shutil.copyfile"}

# What a verb imports when it is called; the server has it before it forks for one.
LATE_IMPORTS = {
    "quantize": ("quantize.start",),
    "evaluate": ("evaluate.start",),
    "compare": ("quantize.start", "evaluate.start"),
    "report": ("reports.write",),
    "serve": ("serve.run",),
    "chat": ("serve.run",),
}

# What of a record differs from run to run.
TIMES = {"fourge/run.json": "timing", "fourge/doctor.json": "checked_at"}


class Finished(NamedTuple):
    """How a process ended; a negative status is the signal that ended it."""

    status: int
    stdout: str
    stderr: str


class Process:
    """A running fourge process; ``wait`` once."""

    def __init__(self, pid: int, folder: tempfile.TemporaryDirectory) -> None:
        self.pid = pid
        self._folder = folder

    @property
    def stderr(self) -> str:
        return (Path(self._folder.name) / "stderr").read_text()

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Finished:
        status = _ask({"wait": self.pid})["status"]
        stdout = (Path(self._folder.name) / "stdout").read_text()
        finished = Finished(status, stdout, self.stderr)
        self._folder.cleanup()
        return finished


def run_fresh(*arguments: object, **options: Any) -> Finished:
    """Run fourge in a new interpreter, as its console script does."""
    command = [sys.executable, "-m", "fourge.cli.main", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    return Finished(done.returncode, done.stdout, done.stderr)


def start(*arguments: object, kill_at: int | None = None, file_limit: int | None = None) -> Process:
    """Start fourge.

    kill_at: SIGKILL itself just before the n-th change of the file system, counted from 1.
    file_limit: no file may grow beyond so many bytes; writing on gives EFBIG.
    """
    folder = tempfile.TemporaryDirectory(prefix="fourge-test-")
    request = {
        "arguments": [str(argument) for argument in arguments],
        "folder": folder.name,
        "kill_at": kill_at,
        "file_limit": file_limit,
    }
    return Process(_ask(request)["pid"], folder)


def run(*arguments: object, **options: Any) -> Finished:
    """Start fourge and wait for its end."""
    return start(*arguments, **options).wait()


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> hash of every file; of records without their times. Folders end in /.

    Two outputs that should be the same compare equal; a difference shows by its path.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            found[name + "/"] = "folder"
            continue
        data = path.read_bytes()
        if name in TIMES:
            record = json.loads(data)
            record.pop(TIMES[name])
            data = json.dumps(record).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def tensor_bytes_of(path: Path) -> int:
    """Bytes of all tensors of a safetensors file; fails unless the file is whole."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    ends = [0, *(entry["data_offsets"][1] for entry in header.values())]
    assert start + max(ends) == len(data), f"{path} is not whole"
    return max(ends)


@functools.cache
def _server() -> subprocess.Popen:
    # One BLAS thread: OpenBLAS would start its own at import, and forks do not have them.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


# -- the server -----------------------------------------------------------------------------------


def _serve() -> None:
    """Answer requests until stdin ends; a forked child is fourge and never comes back."""
    from fourge.cli.main import main

    _warm_up(main)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = {"status": os.waitstatus_to_exitcode(status)}
        else:
            for module in LATE_IMPORTS.get(request["arguments"][0], ()):
                importlib.import_module(f"fourge.{module}")
            pid = os.fork()
            if pid == 0:
                _become_fourge(request)
                os._exit(_status_of(main))
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def _warm_up(main: Callable[[], None]) -> None:
    """Import and compile what every run needs. Starts no thread, since forks would lack it."""
    import torch

    from fourge.formats import kernels, nvfp4

    weights = torch.ones(16, 16, dtype=torch.bfloat16)
    kernels.quantize(weights, nvfp4.weight_scale_2(kernels.amax(weights)))
    # The first imports every verb; the second what reads arguments (pydantic, for typer).
    for arguments in (["--help"], ["doctor", os.devnull]):
        sys.argv = ["fourge", *arguments]
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.suppress(SystemExit),
        ):
            main()


def _status_of(main: Callable[[], None]) -> int:
    """What the interpreter would make of ``main``, without the 0.4 s of taking torch apart."""
    status: Any = 0
    try:
        main()
    except SystemExit as ending:
        status = ending.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _become_fourge(request: dict[str, Any]) -> None:
    sys.argv = ["fourge", *request["arguments"]]
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(os.path.join(request["folder"], name), os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(file, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if request["file_limit"]:
        limit = request["file_limit"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if request["kill_at"]:
        _kill_at_change(request["kill_at"])


def _kill_at_change(number: int) -> None:
    left = number

    def count(event: str, _: Sequence[object]) -> None:
        nonlocal left
        if event in CHANGES:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


if __name__ == "__main__":
    _serve()
