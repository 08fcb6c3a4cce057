"""The engine's process: what the server does when it is gone, and it when the server is."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from fourge.errors import CheckpointError, ConfigError, EngineError, FourgeError
from fourge.serve.engine_process import EngineProcess
from fourge.serve.run import Setup, load
from serving import running

SMALL: dict[str, Any] = {"cache_tokens": 8192, "max_num_seqs": 4}
ASK: dict[str, Any] = {
    "model": "tiny-glm", "messages": [{"role": "user", "content": "Hi"}], "stream": True,
    "max_tokens": 4000, "ignore_eos": True,
}  # fmt: skip


def test_streams_end_and_the_server_says_so_when_the_engine_is_killed(
    tiny_glm: Path, one_thread: None, caplog: pytest.LogCaptureFixture
):
    before = set(psutil.Process().children())
    served = load(Setup(checkpoint=tiny_glm, names=("tiny-glm",), engine=SMALL), lambda *_: None)
    (child,) = set(psutil.Process().children()) - before
    with running(served) as found, httpx2.Client(base_url=found.url, timeout=60) as http:
        assert http.get("/health").status_code == 200
        with http.stream("POST", "/v1/chat/completions", json=ASK) as answer:
            lines = (line for line in answer.iter_lines() if line)
            for _ in range(3):
                next(lines)
            child.kill()
            *_, error, done = lines
        assert done == "data: [DONE]"
        told = json.loads(error.removeprefix("data: "))["error"]
        assert (told["code"], told["message"]) == ("engine_stopped", "the engine has stopped.")
        assert http.get("/health").status_code == 503
        late = http.post("/v1/chat/completions", json=ASK | {"stream": False})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "engine_stopped")
        constrained = ASK | {"response_format": {"type": "json_object"}}
        assert http.post("/v1/chat/completions", json=constrained).status_code == 503
        assert found.service.admission.taken == 0
    assert "ended with signal SIGKILL" in caplog.text
    served.engine.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"preferred": {"heat": 1}},
        {"preferred": {"top_p": 2}},
        {"template_options": {"shape": 1}},
    ],
)
def test_what_needs_no_weights_is_refused_before_they_are_loaded(
    tiny_glm: Path, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fourge.serve.run.EngineProcess", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(FourgeError, match=r"heat|top_p is 2|shape"):
        load(Setup(checkpoint=tiny_glm, **wrong), lambda *_: None)


def test_what_is_no_folder_is_said_to_be_none(tmp_path: Path):
    with pytest.raises(CheckpointError, match="nothing is not a folder"):
        load(Setup(checkpoint=tmp_path / "nothing"), lambda *_: None)


def test_a_server_that_is_killed_leaves_no_engine_behind(tiny_glm: Path):
    command = [sys.executable, "-m", "fourge.cli.main", "serve", str(tiny_glm), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while not process.stderr.readline().startswith("serving "):
        pass
    (child,) = psutil.Process(process.pid).children()
    os.kill(child.pid, signal.SIGTERM)  # as a whole group may get it: the server decides
    time.sleep(0.2)
    assert child.is_running()
    process.kill()
    process.wait()
    process.stderr.close()
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running()


def test_errors_of_loading_are_those_of_the_engine(tiny_glm: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        EngineProcess(tmp_path, {}, lambda *_: None)
    with pytest.raises(EngineError, match="max_model_len is 999999"):
        EngineProcess(tiny_glm, {"max_model_len": 999999}, lambda *_: None)
    # A bug's traceback is on stderr.
    with pytest.raises(EngineError, match="process ended with status 1 while it loaded"):
        EngineProcess(tiny_glm, {"on_progress": None}, lambda *_: None)
