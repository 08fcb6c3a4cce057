"""Clients that leave at any point of a request: nothing of them stays."""

import json
import random
import socket
import time
from contextlib import suppress
from typing import Any

import httpx2
import pytest

from serving import Running

HI = [{"role": "user", "content": "What do rivers carry? " * 20}]
LONG: dict[str, Any] = {"model": "tiny-glm", "max_tokens": 3000}
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": LONG | {"messages": HI, "n": 3, "ignore_eos": True},
    "/v1/completions": LONG | {"prompt": ["a", "b"], "ignore_eos": True},
    "/v1/messages": LONG | {"messages": HI},
    "/v1/responses": {"model": "tiny-glm", "max_output_tokens": 3000, "input": "Hi"},
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_whoever_leaves_leaves_nothing(server: Running, path: str, stream: bool):
    httpx2.get(f"{server.url}/health")
    before = state(server)
    choices = random.Random(path)
    body = json.dumps(REQUESTS[path] | {"stream": stream}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    whole = head + body
    ends = [3, len(head) - 2, len(head), len(head) + len(body) // 2, len(whole) - 1]
    for sent in ends + [len(whole)] * 12:
        with connected(server) as client:
            client.sendall(whole[:sent])
            if sent == len(whole):
                wait(client, choices)
            if choices.random() < 0.5:  # a reset rather than an end
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    settles(server, before)


def test_leaving_while_a_grammar_is_compiled(server: Running):
    before = state(server)
    body = LONG | {"messages": HI, "tools": [TOOL], "tool_choice": "required"}
    for number in range(6):
        schema = {"type": "object", "properties": {f"k{number}": {"enum": list(range(500))}}}
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        text = json.dumps(body | {"tools": [tool]}).encode()
        with connected(server) as client:
            client.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n"
                b"Content-Type: application/json\r\n\r\n" % len(text) + text
            )
            time.sleep(0.004 * number)
    settles(server, before)


def connected(server: Running) -> socket.socket:
    url = httpx2.URL(server.url)
    return socket.create_connection((url.host, url.port), timeout=30)


def wait(client: socket.socket, choices: random.Random) -> None:
    """Until something between the request's arrival and its first few tokens."""
    time.sleep(choices.choice((0, 0.001, 0.003, 0.01, 0.05)))
    if choices.random() < 0.3:
        client.settimeout(0.2)
        with suppress(TimeoutError):
            client.recv(choices.choice((1, 4000)))


def state(server: Running) -> dict[str, float]:
    found = {name: server.stats[name] for name in ("running", "waiting", "cache_usage")}
    return found | {"taken": server.service.admission.taken}


def settles(server: Running, before: dict[str, float]) -> None:
    """All of it is as it was, within a few steps of the engine."""
    deadline = time.monotonic() + 20
    while state(server) != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert state(server) == before
    answer = httpx2.post(
        f"{server.url}/v1/chat/completions",
        json={"model": "tiny-glm", "messages": HI, "max_tokens": 2}, timeout=60,
    )  # fmt: skip
    assert answer.status_code == 200
