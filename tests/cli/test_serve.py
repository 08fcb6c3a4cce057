"""`fourge serve` and `fourge chat` as a user runs them: whole processes."""

import fcntl
import inspect
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import openai
import psutil
import pytest

from fourge.cli import serve as serve_verb
from fourge.engine.options import EngineOptions
from fourge_process import run, run_fresh
from scripted_engine import scripted
from serving import eventually, running

FOURGE = [sys.executable, "-m", "fourge.cli.main"]
SMALL = ("--cache-tokens", "8192", "--max-num-seqs", "4")


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server process that is ready, and its address."""
    process = subprocess.Popen(
        [*FOURGE, "serve", *map(str, arguments), "--port", "0"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if line.startswith("serving "):
                break
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_server_drains_and_stops_cleanly(tiny_glm: Path):
    names = ("--served-model-name", "a", "--served-model-name", "b")
    extra = ("--preferred-sampling-params", '{"temperature": 0}', "--api-key", "secret", *SMALL)
    with serving(tiny_glm, *names, *extra) as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        assert [model.id for model in client.models.list()] == ["a", "b"]
        stream = client.chat.completions.create(
            model="b", messages=[{"role": "user", "content": "Hi"}], max_tokens=150, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        next(stream)
        process.send_signal(signal.SIGTERM)
        chunks = list(stream)  # goes on to its end
        client.close()
        assert chunks[-1].choices[0].finish_reason == "length"
        assert process.wait(30) == 0
        assert process.stderr is not None
        *_, line, end = process.stderr.read().splitlines()
    assert end == "stopped"
    record = json.loads(line)
    assert (record["path"], record["output_tokens"]) == ("/v1/chat/completions", 150)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preferred-sampling-params", "{"], "is not JSON"),
        (["--preferred-sampling-params", '{"heat": 1}'], "have heat; known are"),
        (["--preferred-sampling-params", '{"top_p": 2}'], "top_p is 2"),
        (["--chat-template-kwargs", '{"shape": 1}'], "no option shape"),
        (["--max-model-len", "999999"], "max_model_len is 999999"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_sentence(
    tiny_glm: Path, arguments: list[str], says: str
):
    done = run("serve", tiny_glm, "--port", "0", *arguments)
    assert done.status == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_every_option_of_the_engine_can_be_given():
    parameters = inspect.signature(serve_verb.serve).parameters
    assert set(serve_verb._OF_ENGINE.values()) <= set(parameters)
    known = {one.name for one in fields(EngineOptions)}
    assert {*serve_verb._OF_ENGINE, "hf_overrides"} == known


def test_a_server_that_is_stopped_while_it_loads_does_not_load_to_the_end(tiny_glm: Path):
    process = subprocess.Popen(
        [*FOURGE, "serve", str(tiny_glm), "--port", "0"], stderr=subprocess.PIPE, text=True
    )
    while not (children := psutil.Process(process.pid).children()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said.splitlines()[-1] == "stopped"
    assert "serving" not in said
    assert not any(child.is_running() for child in children)


def test_a_taken_port_costs_no_loading(tiny_glm: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("serve", tiny_glm, "--port", port)
    assert done.status == 2
    assert done.stderr.startswith(f"fourge: 127.0.0.1:{port}: cannot listen: Address already")


def test_a_checkpoint_answers_lines_from_a_pipe(tiny_glm: Path):
    questions = "Hi\n/system Be brief.\nAnd?\n/history\n/reset\n/history\n/nonsense\n"
    done = subprocess.run(
        [*FOURGE, "chat", str(tiny_glm), "--max-tokens", "12", "--temperature", "0", "--no-think",
         "--", *SMALL],
        input=questions, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    shown = done.stderr[done.stderr.index("system: Be brief.") :]
    assert shown.count("system: Be brief.") == 3  # set, and in both histories
    assert shown.count("user: And?") == 1
    assert f"assistant: {answers[0]}" in shown
    assert len(re.findall(r"^\[\w+, \d+ tokens, [\d.]+ a second\]$", done.stderr, re.M)) == 2
    assert "/nonsense is no command" in shown


def test_reasoning_is_dim_and_ctrl_c_stops_an_answer(tiny_glm: Path, tmp_path: Path):
    served, engine = scripted(tiny_glm, "I think.</think>Hello.", "a " * 500, pause_s=0.02)
    with running(served) as found:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [*FOURGE, "chat", f"{found.url}/v1"], stdin=theirs, stdout=theirs, stderr=theirs,
            env=os.environ | {"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"},
            preexec_fn=_control,
        )  # fmt: skip
        os.close(theirs)
        text = _talk(ours, "> ", "Hi\n", "second]\r\n> ")
        assert "\x1b[2mI\x1b[0m" in text
        assert "\x1b[2mHello" not in text
        assert "Hello." in re.sub(r"\x1b\[[0-9;]*m", "", text)
        text = _talk(ours, "", "Again\n", " a")
        os.write(ours, b"\x03")
        assert "stopped" in _talk(ours, "", "", "]\r\n> ")
        _talk(ours, "", "/quit\n")
        assert process.wait(20) == 0
        os.close(ours)
        eventually(lambda: engine.under_way == 0)
    assert (tmp_path / "fourge" / "chat-history").read_text().split() == ["Hi", "Again", "/quit"]


def test_a_refusal_is_told_and_the_conversation_goes_on(tiny_glm: Path):
    served, engine = scripted(tiny_glm, "</think>Yes")
    with running(served) as found:
        done = run_fresh("chat", found.url, "--temperature", "1000", input="Hi\n/history\n")
        none = run_fresh("chat", found.url, "--model", "gpt", input="Hi\n")
    assert (done.status, done.stdout, engine.prompts) == (0, "", [])
    assert "refuses (400): temperature is 1000" in done.stderr
    assert "user:" not in done.stderr
    assert "refuses (404)" in none.stderr


def test_no_server_is_unusable_input(tiny_glm: Path):
    done = run("chat", "http://127.0.0.1:9")
    assert done.status == 2
    assert "no server answers at http://127.0.0.1:9" in done.stderr
    missing = run("chat", tiny_glm / "nothing")
    assert missing.status == 2
    assert "Traceback" not in missing.stderr


def _control() -> None:
    """Make the terminal on stdin that of the process, so that ^C is a signal."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _talk(terminal: int, before: str, text: str, *until: str) -> str:
    """Wait for ``before``, type ``text``, and read until all of ``until`` came, in order."""
    seen = _read(terminal, before)
    os.write(terminal, text.encode())
    return seen + "".join(_read(terminal, one) for one in until)


def _read(terminal: int, wanted: str) -> str:
    seen = ""
    while wanted not in seen:
        assert select.select([terminal], [], [], 20)[0], f"waited for {wanted!r} after {seen!r}"
        seen += os.read(terminal, 4096).decode(errors="replace")
    return seen
