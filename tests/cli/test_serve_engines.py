"""`fourge serve --engine vllm`: the launch of another engine, started and tested, or refused."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fourge_process import run

FAKE = Path(__file__).parent.parent / "fake_engine.py"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--engine", "vllm", "--speculative-tokens", "2"], "differ in --speculative-tokens"),
        (["--engine", "sglang", "--api-key", "a", "--api-key", "b"], "one --api-key at most"),
        (["--hardware", "h200"], "--hardware is for --engine vllm or sglang"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(tiny_glm: Path, options: list[str], says: str):
    done = run("serve", tiny_glm, *options)
    assert done.status == 2
    assert says in done.stderr


def test_another_engine_is_started_and_tested(tiny_glm: Path, tmp_path: Path):
    program = tmp_path / "vllm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    program.chmod(0o755)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "FAKE_ENGINE": "",
        "FAKE_ENGINE_PIDS": str(tmp_path / "pids"),
    }
    command = [sys.executable, "-m", "fourge.cli.main", "serve", str(tiny_glm), "--engine", "vllm"]
    command += ["--hardware", "1xh200", "--port", str(port), "--max-model-len", "2048"]
    log = tmp_path / "log"
    with log.open("w") as err:
        process = subprocess.Popen(command, stderr=err, env=environment)
        end = time.monotonic() + 60
        try:
            while "Ctrl-C stops it" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()
    assert "short prompt" in log.read_text()
