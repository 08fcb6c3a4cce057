"""Engines as children: the whole group ends, however stubborn; what log lines tell."""

import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from fourge.errors import LaunchError
from fourge.launch import process
from fourge.launch.process import EngineProcess, describe

FAKE = Path(__file__).parent.parent / "fake_engine.py"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("Loading safetensors checkpoint shards:  62% Completed | 51/82", "loading weights, 62 %"),
        ("(Worker pid=1) INFO Model loading took 55.43 GiB and 9 s", "weights loaded, 55.43 GiB"),
        ("[TP0] Load weight begin. avail mem=93.30 GB", "loading weights"),
        ("[TP0] Load weight end. type=X, mem usage=57.06 GB.", "weights loaded, 57.06 GB"),
        ("GPU KV cache size: 432,832 tokens", "KV cache of 432,832 tokens"),
        ("KV Cache is allocated. #tokens: 367404, K size: 8.23 GB", "KV cache of 367404 tokens"),
        ("Capture cuda graph begin. This can take up to several minutes.", "capturing CUDA graphs"),
        ("The server is fired up and ready to roll!", "ready"),
        ("INFO: 127.0.0.1 - GET /health", None),
    ],
)
def test_lines_of_the_logs(line: str, told: str | None):
    found = describe(line)
    assert found is None if told is None else str(found).startswith(told)


def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: str) -> EngineProcess:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {
        "PATH": "/usr/bin:/bin",
        "FAKE_ENGINE": faults,
        "FAKE_ENGINE_PIDS": str(tmp_path / "pids"),
    }
    words = [sys.executable, str(FAKE), "--port", str(port)]
    engine = EngineProcess(words, environment, tmp_path / "log", lambda _: None)
    engine.wait_healthy(f"http://127.0.0.1:{port}/health", 30)
    return engine


def lives(tmp_path: Path) -> list[bool]:
    pids = (tmp_path / "pids").read_text().split()
    return [Path(f"/proc/{pid}").exists() and "Z" not in _state(pid) for pid in pids]


def _state(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_the_whole_group_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    engine = start(tmp_path, monkeypatch, "")
    assert lives(tmp_path) == [True, True]
    begin = time.monotonic()
    engine.stop()
    assert time.monotonic() - begin < 10
    assert lives(tmp_path) == [False, False]


def test_a_stubborn_engine_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    patience = ((signal.SIGINT, 0.3), (signal.SIGTERM, 0.3), (signal.SIGKILL, 5.0))
    monkeypatch.setattr(process, "PATIENCE_S", patience)
    engine = start(tmp_path, monkeypatch, "stubborn")
    engine.stop()
    assert lives(tmp_path) == [False, False]


def test_time_that_runs_out_is_told_of(tmp_path: Path):
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    with (
        EngineProcess(words, {}, tmp_path / "log", lambda _: None) as engine,
        pytest.raises(LaunchError, match=r"did not answer .* within 0.3 s; its log is .*log"),
    ):
        engine.wait_healthy("http://127.0.0.1:9/health", 0.3)
    assert engine.wait() == -signal.SIGINT
