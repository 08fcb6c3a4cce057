"""Large bodies: the others go on meanwhile, and what is too much is refused before it is read."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fourge.serve.limits import Limits
from scripted_engine import scripted
from serving import Running, running

CHAT = "/v1/chat/completions"
HI: dict[str, Any] = {"model": "tiny-glm", "messages": [{"role": "user", "content": "Hi"}]}
LARGE = 5 << 20  # bytes


@pytest.fixture
def server(tiny_glm: Path) -> Iterator[Running]:
    """Answers take 10 s; the context has room for whatever comes."""
    served, engine = scripted(tiny_glm, "a", pause_s=0.01)
    engine.scripts = [[40] * 1000]
    with running(replace(served, max_model_len=1 << 30), limits=Limits(max_waiting=0)) as found:
        yield found


def test_a_stream_goes_on_while_a_large_body_is_read(server: Running):
    text = json.dumps(
        HI | {"messages": [{"role": "user", "content": "One more word. " * 160}] * 2200}
    )
    assert len(text) > LARGE
    address = httpx2.URL(server.url)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with (
        httpx2.Client(base_url=server.url, timeout=120) as http,
        http.stream("POST", CHAT, json=HI | {"stream": True}) as stream,
        socket.create_connection((address.host, address.port)) as other,
    ):
        lines = stream.iter_lines()
        next(lines)
        other.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode())
        # Reading it takes a second or more; a loop that waited would show nothing meanwhile.
        while server.service.admission.taken < 2:
            next(lines)
        for _ in range(30):
            next(lines)
        assert server.service.admission.taken == 2
        other.setblocking(False)
        with pytest.raises(BlockingIOError):  # no answer yet
            other.recv(1)


def test_nobody_waits_for_the_grammar_of_somebody_else(tiny_glm: Path):
    served, _ = scripted(tiny_glm, "a", compile_s=2)
    body = HI | {"response_format": {"type": "json_object"}}
    with (
        running(served) as found,
        httpx2.Client(base_url=found.url, timeout=120) as http,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(httpx2.post, found.url + CHAT, json=body, timeout=60)
        while found.service.admission.taken < 1:
            time.sleep(0.01)
        assert http.post(CHAT, json=HI).status_code == 200
        assert not waiting.done()
        assert waiting.result().status_code == 200


def test_what_cannot_fit_is_refused_before_its_tokens_are_counted(tiny_glm: Path):
    served, engine = scripted(tiny_glm, "a")
    text = "x" * (served.most_characters or 0)
    with running(served) as found, httpx2.Client(base_url=found.url, timeout=120) as http:
        chat = http.post(CHAT, json=HI | {"messages": [{"role": "user", "content": text}]})
        plain = http.post("/v1/completions", json={"model": "tiny-glm", "prompt": text + "x"})
    for answer in (chat, plain):
        assert answer.status_code == 400
        assert (
            "which are more than 4096 tokens (max_model_len)" in answer.json()["error"]["message"]
        )
    assert engine.prompts == []


@pytest.mark.parametrize(
    ("path", "name"), [(CHAT, "messages"), ("/v1/responses", "input"), ("/tokenize", "messages")]
)
def test_too_many_messages_are_counted_before_they_are_read(server: Running, path: str, name: str):
    items: list[Any] = ["no message"] * 5000  # each of which would be an error by itself
    answer = httpx2.post(server.url + path, json={"model": "tiny-glm", name: items})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, name)
    assert error["message"] == "there are 5000 messages; at most 4096 are taken."
