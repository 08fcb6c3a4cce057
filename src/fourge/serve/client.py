"""The other end: a conversation with any OpenAI-compatible server, as `fourge chat` has it.

Knows HTTP and the events of a stream; nothing of terminals.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from fourge.errors import EngineError, RequestError

# The first token of a long prompt may take minutes.
_TIMEOUT = httpx2.Timeout(10.0, read=3600.0)


@dataclass
class Turn:
    """An answer that grows while it is streamed."""

    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Mapping[str, Any] | None = None
    metrics: Mapping[str, Any] | None = None

    def message(self) -> dict[str, Any]:
        """As it goes back to the server with the next question."""
        found: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            found["reasoning_content"] = self.reasoning
        return found | ({"tool_calls": self.calls} if self.calls else {})


class ChatClient:
    """One server and one of its models. Raises EngineError if no server answers, RequestError if it
    refuses."""

    def __init__(self, url: str, *, model: str | None, api_key: str | None) -> None:
        base = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx2.Client(base_url=f"{base}/v1/", headers=headers, timeout=_TIMEOUT)
        self._url = base
        self.model = model or self._first_model()

    def close(self) -> None:
        self._http.close()

    def ask(
        self, messages: list[dict[str, Any]], options: Mapping[str, Any], turn: Turn
    ) -> Iterator[tuple[str, str]]:
        """Fill ``turn``; gives what is added: "reasoning", "content", "call", and its text; "end"
        at last."""
        body = {
            "model": self.model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **options,
        }
        try:
            with self._http.stream("POST", "chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise RequestError(_reason(answer))
                for line in answer.iter_lines():
                    data = line.removeprefix("data: ")
                    if data == line or data == "[DONE]":
                        continue
                    yield from _added(turn, json.loads(data))
        except httpx2.HTTPError as error:
            raise self._no_answer(error) from error
        yield "end", ""

    def _first_model(self) -> str:
        try:
            answer = self._http.get("models")
            if answer.status_code != 200:
                raise RequestError(_reason(answer))
            return answer.json()["data"][0]["id"]
        except httpx2.HTTPError as error:
            raise self._no_answer(error) from error
        except (ValueError, LookupError, TypeError) as error:
            raise RequestError(
                f"{self._url}/v1/models names no model: give one with --model."
            ) from error

    def _no_answer(self, error: httpx2.HTTPError) -> EngineError:
        return EngineError(
            f"no server answers at {self._url} ({error}): start one with `fourge serve`, or give"
            " its address."
        )


def _added(turn: Turn, document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Put one event into the turn."""
    if "error" in document:
        raise RequestError(f"the server gave up: {document['error']['message']}")
    turn.usage = document.get("usage") or turn.usage
    turn.metrics = document.get("metrics") or turn.metrics
    for choice in document.get("choices") or []:
        delta = choice.get("delta") or {}
        turn.finish_reason = choice.get("finish_reason") or turn.finish_reason
        if text := delta.get("reasoning_content") or delta.get("reasoning"):
            turn.reasoning += text
            yield "reasoning", text
        if text := delta.get("content"):
            turn.content += text
            yield "content", text
        for piece in delta.get("tool_calls") or []:
            yield "call", _add_call(turn, piece)


def _add_call(turn: Turn, piece: Mapping[str, Any]) -> str:
    function = piece.get("function") or {}
    text = function.get("arguments") or ""
    if piece.get("id"):
        name = function.get("name") or ""
        turn.calls.append(
            {"id": piece["id"], "type": "function", "function": {"name": name, "arguments": text}}
        )
        return f"\n{name} {text}"
    turn.calls[-1]["function"]["arguments"] += text
    return text


def _reason(answer: httpx2.Response) -> str:
    """What the server says of its refusal."""
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = answer.text[:200]
    return f"the server refuses ({answer.status_code}): {message}"
