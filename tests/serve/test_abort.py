"""POST /abort: a request is ended by somebody else than its client."""

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from scripted_engine import ScriptedEngine, scripted
from serving import Running, eventually, running

ASK: dict[str, Any] = {"model": "glm", "messages": [{"role": "user", "content": "Hi"}]}
ABORTED = {
    "message": "the request was aborted.", "type": "request_aborted", "param": None,
    "code": "aborted",
}  # fmt: skip


@pytest.fixture
def endless(tiny_glm: Path) -> Iterator[tuple[Running, ScriptedEngine]]:
    served, engine = scripted(tiny_glm, "a " * 5000, pause_s=0.005)
    with running(served) as found:
        yield found, engine


def test_a_stream_ends_with_an_error_and_frees_its_cache(
    endless: tuple[Running, ScriptedEngine], caplog: pytest.LogCaptureFixture
):
    server, engine = endless
    caplog.set_level(logging.INFO, "fourge.serve")
    with httpx2.Client(base_url=server.url, timeout=20) as http:
        headers = {"X-Request-Id": "mine"}
        body = ASK | {"stream": True, "n": 2}
        with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            assert abort(server, request_ids=["nobody's", "mine", "mine"]) == ["mine"]
            *_, error, done = lines
    assert json.loads(error.removeprefix("data: ")) == {"error": ABORTED}
    assert done == "data: [DONE]"
    settled(server, engine)
    eventually(lambda: '"id": "mine"' in caplog.text)
    logged = [json.loads(one.message) for one in caplog.records if one.message.startswith("{")]
    (line,) = [one for one in logged if one["id"] == "mine"]
    assert line["error"] == "the request was aborted."
    assert abort(server, request_ids=["mine"]) == []


def test_all_requests_end_whatever_their_surface(endless: tuple[Running, ScriptedEngine]):
    """The official clients raise at once and do not try again."""
    server, engine = endless
    chat = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2)
    claude = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=2)
    asked = {
        "chat": lambda: chat.chat.completions.create(**ASK),
        "completion": lambda: chat.completions.create(model="glm", prompt="Hi"),
        "response": lambda: chat.responses.create(model="glm", input="Hi"),
        "message": lambda: claude.messages.create(**ASK, max_tokens=4000),
    }
    statuses: dict[str, int] = {}

    def ask(name: str) -> None:
        try:
            asked[name]()
        except (openai.APIStatusError, anthropic.APIStatusError) as error:
            statuses[name] = error.status_code

    threads = [threading.Thread(target=ask, args=[name]) for name in asked]
    for thread in threads:
        thread.start()
    eventually(lambda: engine.under_way == len(asked))
    assert len(abort(server, abort_all=True)) == len(asked)
    for thread in threads:
        thread.join(20)
    chat.close()
    claude.close()
    assert statuses == dict.fromkeys(asked, 499)
    assert len(engine.prompts) == len(asked)
    settled(server, engine)


@pytest.mark.parametrize(
    "body", [{}, {"abort_all": False}, {"request_ids": ["a"], "abort_all": True}]
)
def test_which_ones_has_to_be_said(
    endless: tuple[Running, ScriptedEngine], body: dict[str, object]
):
    answer = httpx2.post(f"{endless[0].url}/abort", json=body)
    assert answer.status_code == 400
    assert "either request_ids or abort_all" in answer.json()["error"]["message"]


def test_it_needs_the_key(tiny_glm: Path):
    served, _ = scripted(tiny_glm, "Hi")
    with running(served, api_keys=("secret",)) as server:
        answer = httpx2.post(f"{server.url}/abort", json={"abort_all": True})
    assert answer.status_code == 401


def abort(server: Running, **body: object) -> list[str]:
    answer = httpx2.post(f"{server.url}/abort", json=body)
    assert answer.status_code == 200
    return answer.json()["aborted"]


def settled(server: Running, engine: ScriptedEngine) -> None:
    eventually(lambda: engine.under_way == server.service.admission.taken == 0)
