"""What the server refuses, and that it says what is wrong: 4xx in the form of the surface."""

import json
import select
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from fourge.serve.limits import Limits
from scripted_engine import ScriptedEngine, scripted
from serving import Running, eventually, running

HI = {"model": "tiny-glm", "messages": [{"role": "user", "content": "Hi"}]}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def strict(tiny_glm: Path) -> Iterator[tuple[Running, ScriptedEngine]]:
    """A server with a key and narrow limits, on a slow engine."""
    served, engine = scripted(tiny_glm, "a b c d e f g h", pause_s=0.05)
    limits = Limits(
        max_body_bytes=4096, max_messages=3, max_choices=12, max_waiting=0, request_timeout_s=0.3,
        ping_interval_s=0.02,
    )  # fmt: skip
    with running(served, limits=limits, api_keys=("first", "second")) as found:
        yield found, engine


@pytest.fixture
def slow(tiny_glm: Path) -> Iterator[tuple[Running, ScriptedEngine]]:
    """A server whose answers take 20 s, with room for 8 of them."""
    served, engine = scripted(tiny_glm, "a", pause_s=0.02)
    engine.scripts = [[40] * 1000]
    with running(served, limits=Limits(max_waiting=0)) as found:
        yield found, engine


@pytest.fixture
def ask(strict: tuple[Running, ScriptedEngine]) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=strict[0].url, headers={"Authorization": "Bearer second"}) as found:
        yield found


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"max_tokenz": 5}, "max_tokenz", "did you mean max_tokens?"),
        ({"best_of": 2}, "best_of", "not supported by this server"),
        ({"stream_options": {"usage": True}}, "stream_options.usage", "not a field"),
        (
            {"stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "False",
        ),
        ({"max_output_tokens": 5}, "max_output_tokens", "did you mean max_tokens?"),
        ({"verbosity": "low"}, "verbosity", "leave it out"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"temperature": 1000}, None, "temperature is 1000"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 13}, "n", "at most 12"),
        ({"top_logprobs": 2}, None, "needs logprobs"),
        ({"tool_choice": "required"}, None, "needs tools"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "boss", "content": "x"}]}, None, "message 1 has role"),
        ({"messages": [{"role": "user", "content": "x"}] * 4}, "messages", "at most 3"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "image_url"),
        ({"chat_template_kwargs": {"shape": 1}}, None, "no option shape"),
        ({"chat_template_kwargs": {"tokenize": True}}, None, "no option tokenize"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"continue_final_message": True}, None, "assistant's message"),
        ({"stop_token_ids": [99999]}, None, "stop_token_ids has 99999"),
        ({"store": True}, "store", "False"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_a_bad_field_is_named(ask: httpx2.Client, changes: Any, param: str | None, says: str):
    answer = ask.post(CHAT, json=HI | changes)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert says in error["message"]
    assert error["param"] == param


def test_null_is_the_same_as_absent(ask: httpx2.Client):
    nulls = dict.fromkeys(("temperature", "stop", "tools", "best_of", "response_format"))
    assert ask.post(CHAT, json=HI | nulls | {"max_tokens": 1}).status_code == 504  # by its limit


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[1]", 400),
        (b"\xff\xfe", 400),
        (b"", 400),
        (b"[" * 2000, 400),
        (b'{"model": "tiny-glm", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}', 404),
        (b'{"model": "tiny-glm", "messages": [{"role": "\\udfff", "content": "x"}]}', 400),
        (b'{"model": "tiny-glm", "temperature": NaN, "messages": [{"role": "user"}]}', 400),
        (b'{"model": "gpt-4", "messages": [{"role": "user", "content": "x"}]}', 404),
        (b" " * 5000, 413),
    ],
    ids=["cut", "list", "bytes", "nothing", "deep", "half", "half-name", "half-role", "nan",
         "model", "large"],
)  # fmt: skip
def test_a_hostile_body_is_refused(ask: httpx2.Client, body: bytes, status: int):
    answer = ask.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_a_body_without_a_length_is_measured(ask: httpx2.Client):
    def parts() -> Iterator[bytes]:
        for _ in range(10):
            yield b" " * 1000

    answer = ask.post(CHAT, content=parts(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert "at most 4096 bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize("piece", [b"a" * 4096, b"a: b\r\n" * 512], ids=["one", "many"])
def test_headers_without_end_are_not_read_for_ever(
    strict: tuple[Running, ScriptedEngine], piece: bytes
):
    address = httpx2.URL(strict[0].url)
    with socket.create_connection((address.host, address.port), timeout=10) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        sent, answer = 0, b""
        with suppress(ConnectionError):
            while sent < 64 << 20:
                sent += client.send(piece)
                if select.select([client], [], [], 0)[0]:
                    answer = client.recv(4096)
                    break
    assert sent < 16 << 20
    assert not answer or answer.startswith(b"HTTP/1.1 400 ")


def test_without_the_key_nothing_is_told(strict: tuple[Running, ScriptedEngine]):
    with httpx2.Client(base_url=strict[0].url) as http:
        for path in ("/v1/models", "/server_info", "/metrics"):
            answer = http.get(path)
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert http.get(path, headers={"Authorization": "Bearer sec"}).status_code == 401
            assert http.get(path, headers={"x-api-key": "first"}).status_code == 200
        assert http.get("/health").status_code == 200
    with pytest.raises(openai.AuthenticationError, match="API key"):
        openai.OpenAI(base_url=f"{strict[0].url}/v1", api_key="third").models.list()
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=strict[0].url, api_key="ключ".encode().hex()).models.list()


def test_a_full_queue_says_when_to_come_again(slow: tuple[Running, ScriptedEngine]):
    running_server, engine = slow
    with httpx2.Client(base_url=running_server.url, timeout=30) as http:
        with http.stream("POST", CHAT, json=HI | {"stream": True, "n": 8}) as busy:
            lines = busy.iter_lines()  # held: its end would close the stream
            next(lines)
            refused = http.post(CHAT, json=HI)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["Retry-After"]) >= 1
    eventually(lambda: engine.under_way == 0 and running_server.service.admission.taken == 0)


def test_a_request_ends_at_its_time(ask: httpx2.Client, strict: tuple[Running, ScriptedEngine]):
    whole = ask.post(CHAT, json=HI)
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
    lines = list(ask.post(CHAT, json=HI | {"stream": True}).iter_lines())
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert json.loads(events[-2])["error"]["code"] == "timeout"
    assert events[-1] == "[DONE]"
    assert ": ping" in lines
    eventually(lambda: strict[1].under_way == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(slow: tuple[Running, ScriptedEngine], stream: bool):
    running_server, engine = slow
    with httpx2.Client(base_url=running_server.url, timeout=0.5) as http:
        if stream:
            with http.stream("POST", CHAT, json=HI | {"stream": True}) as answer:
                lines = answer.iter_lines()  # held: its end would close the stream
                next(lines)
                assert running_server.service.admission.taken == 1
        else:
            with pytest.raises(httpx2.ReadTimeout):
                http.post(CHAT, json=HI)
    # Long before the 20 s that the answer takes.
    eventually(lambda: engine.under_way == 0 and running_server.service.admission.taken == 0)
    assert len(engine.prompts) == 1


def test_nothing_is_served_before_the_model_is_there():
    with running(None) as loading, httpx2.Client(base_url=loading.url) as http:
        for answer in (http.get("/health"), http.get("/v1/models"), http.post(CHAT, json=HI)):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "loading"
            assert int(answer.headers["Retry-After"]) >= 1
        assert http.get("/ready").status_code == 503
        assert http.get("/version").status_code == 200


def test_a_failing_engine_is_told_and_does_not_stop_the_server(tiny_glm: Path):
    served, engine = scripted(tiny_glm, "a b", finish="error")
    with running(served) as found, httpx2.Client(base_url=found.url) as http:
        answer = http.post(CHAT, json=HI)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")
        streamed = http.post(CHAT, json=HI | {"stream": True}).text
        assert '"code":"engine_error"' in streamed
        assert streamed.endswith("data: [DONE]\n\n")
        engine.finish = "length"
        assert http.post(CHAT, json=HI).status_code == 200
        engine.is_alive = False
        assert http.get("/health").status_code == 503


def test_the_request_id_is_kept_and_logged(
    tiny_glm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served, _ = scripted(tiny_glm, "</think>Hello")
    caplog.set_level("INFO", "fourge.serve")
    with running(served) as found, httpx2.Client(base_url=found.url) as http:
        kept = http.post(CHAT, json=HI | {"user": "ada"}, headers={"X-Request-Id": "mine-1"})
        odd = http.get("/v1/models", headers={"X-Request-Id": "no\tgood"})
    assert kept.headers["X-Request-Id"] == "mine-1"
    assert len(odd.headers["X-Request-Id"]) == 32
    line = json.loads(caplog.records[0].message)
    assert (line["id"], line["status"], line["finish_reasons"]) == ("mine-1", 200, ["stop"])
    assert line["output_tokens"] == kept.json()["usage"]["completion_tokens"]
    assert line["labels"] == {"user": "ada"}
    assert 0 < line["first_token_s"] <= line["total_s"]
