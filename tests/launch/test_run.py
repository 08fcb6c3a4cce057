"""--run with a small fake engine: progress, smoke test, Ctrl-C, and engines that misbehave."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from fourge.launch.served import Served
from launch_builders import hollow

FAKE = Path(__file__).parent.parent / "fake_engine.py"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Running:
    """``fourge launch --run`` as a process, with a fake engine on PATH."""

    def __init__(self, folder: Path, model: Path, *options: str, faults: str = "") -> None:
        self.pids = folder / "pids"
        self.port = free_port()
        programs = folder / "bin"
        programs.mkdir()
        for name in ("vllm", "python3"):
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
            program.chmod(0o755)
        environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "FAKE_ENGINE": faults,
            "FAKE_ENGINE_PIDS": str(self.pids),
            "TMPDIR": str(folder),
        }
        arguments = ["launch", str(model), "--run", "--port", str(self.port), *options]
        self.err = folder / "stderr"
        self.out = folder / "stdout"
        with self.err.open("w") as err, self.out.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fourge.cli.main", *arguments],
                stdout=out,
                stderr=err,
                env=environment,
            )

    @property
    def told(self) -> str:
        return self.err.read_text()

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in self.told:
            assert self.process.poll() is None, self.told
            assert time.monotonic() < deadline, self.told
            time.sleep(0.05)

    def end(self, number: int | None = None) -> int:
        """Exit status, after a signal if one is given."""
        if number is not None:
            self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def engine_is_gone(self) -> bool:
        """Whether the engine and its own child have ended."""
        return not any(map(_lives, self.pids.read_text().split()))


def _lives(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return hollow(tmp_path_factory.mktemp("model") / "GLM-small")


@pytest.fixture
def started(tmp_path: Path, model: Served) -> Iterator[Mapping]:
    """A function that starts fourge; nothing is left behind."""
    running: list[Running] = []

    def start(*options: str, faults: str = "") -> Running:
        given = options or ("--engine", "vllm", "--hardware", "1xh200")
        running.append(Running(tmp_path, model.folder, *given, faults=faults))
        return running[-1]

    yield start
    for one in running:
        if one.process.poll() is None:
            one.process.kill()
        if one.pids.exists():
            for pid in one.pids.read_text().split():
                if _lives(pid):
                    os.kill(int(pid), signal.SIGKILL)


def test_start_progress_smoke_test_and_ctrl_c(started):
    run = started("--engine", "vllm", "--hardware", "1xh200", "--json", "--api-key", "k")
    run.wait_for("Ctrl-C stops it")
    told = run.told
    phases = [
        "loading weights, 50 %",
        "weights loaded, 55.4 GiB per GPU",
        "21.36 GiB for the KV cache",
        "KV cache of 368,420 tokens",
        "capturing CUDA graphs",
        "ready",
    ]
    places = [told.index(phase) for phase in phases]
    assert places == sorted(places)
    report = json.loads(run.out.read_text())
    assert report["passed"] is True
    assert {check["name"]: check["passed"] for check in report["checks"]} == {
        "short prompt": True,
        "long prompt": True,
        "tool call without arguments": True,
        "tool call with types": True,
        "text beyond ASCII": True,
        "MTP acceptance": True,
    }
    details = {check["name"]: check["detail"] for check in report["checks"]}
    assert "get_time() in 3 pieces" in details["tool call without arguments"]
    assert "0.83 of the drafts" in details["MTP acceptance"]
    tokens = int(re.match(r"([\d,]+) tokens", details["long prompt"])[1].replace(",", ""))
    assert tokens > 2048  # beyond index_topk
    assert "Loading safetensors" in Path(report["log"]).read_text()
    assert run.end(signal.SIGINT) == 0
    assert run.engine_is_gone()
    assert "stopping" in run.told


def test_sigterm_stops_the_engine_too(started):
    run = started()
    run.wait_for("Ctrl-C stops it")
    run.end(signal.SIGTERM)
    assert run.engine_is_gone()


def test_ctrl_c_while_starting(started):
    run = started(faults="hangs")
    run.wait_for("capturing CUDA graphs")
    assert run.end(signal.SIGINT) == 130
    assert run.engine_is_gone()
    assert "Traceback" not in run.told


def test_engine_that_dies_is_told_with_the_end_of_its_log(started):
    run = started(faults="dies")
    assert run.end() == 2
    assert "the engine ended with status 1 before it answered" in run.told
    assert "CUDA out of memory" in run.told
    assert "Traceback" not in run.told
    assert run.engine_is_gone()


def test_failed_checks_stop_the_engine(started):
    faults = "low-acceptance no-retrieval mojibake bad-arguments"
    run = started("--engine", "vllm", "--hardware", "1xh200", "--json", faults=faults)
    assert run.end() == 1
    report = json.loads(run.out.read_text())
    assert report["passed"] is False
    details = {one["name"]: one["detail"] for one in report["checks"] if one["passed"] is False}
    assert details.keys() == {
        "long prompt", "tool call with types", "text beyond ASCII", "MTP acceptance"
    }  # fmt: skip
    assert "is not in 'I do not know.'" in details["long prompt"]
    assert details["tool call with types"] == "hour is '7', needed is int"
    assert "broken UTF-8" in details["text beyond ASCII"]
    assert details["MTP acceptance"].startswith("0.06 of the drafts are accepted")
    assert run.engine_is_gone()


def test_refused_requests_are_failed_checks(started):
    run = started(faults="refuses-tools")
    assert run.end() == 1
    assert 'failed tool call without arguments: ValueError: status 400: {"error"' in run.told
    assert "the smoke test failed; stopping vllm" in run.told
    assert run.engine_is_gone()


def test_sglang_is_started_by_its_module(started):
    run = started("--engine", "sglang", "--hardware", "1xh200", "--mtp", "off", "--context", "2048")
    run.wait_for("Ctrl-C stops it")
    assert "left out long prompt: a context of 2,048 tokens" in run.told
    assert "left out MTP acceptance: MTP is off" in run.told
    assert run.end(signal.SIGINT) == 0
    assert run.engine_is_gone()


def test_missing_engine(tmp_path: Path, model: Served):
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "fourge.cli.main", "launch", str(model.folder), "--engine", "vllm",
         "--hardware", "1xh200", "--run"],
        capture_output=True, text=True, env=environment, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "vllm does not start" in done.stderr
    assert "put its bin folder on PATH" in done.stderr
