"""POST /v1/responses: OpenAI's newer API over the same steps, as Codex and agents use it."""

import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from fourge.errors import RequestError
from fourge.serve.answer import Step
from fourge.serve.bodies import body_route
from fourge.serve.constraints import Format
from fourge.serve.errors import ApiError
from fourge.serve.generation import Generation
from fourge.serve.items import OutputItems, decrypted
from fourge.serve.preparing import Conversation, Sampling, chat_job
from fourge.serve.protocol.fields import JsonBySchema, JsonSchema
from fourge.serve.protocol.responses import (
    CallItem,
    CallOutputItem,
    MessageItem,
    NamedFunction,
    Part,
    ReasoningItem,
    ResponsesRequest,
    SchemaFormat,
)
from fourge.serve.service import Service
from fourge.serve.streaming import event, label


def router(service: Service) -> APIRouter:
    """The routes of this surface."""
    routes = APIRouter(tags=["OpenAI"], route_class=body_route(service.limits.max_messages))

    @routes.post("/v1/responses", response_model=None)
    async def create(request: Request, body: ResponsesRequest) -> Response:
        label(
            request, user=body.user, safety_identifier=body.safety_identifier,
            prompt_cache_key=body.prompt_cache_key, metadata=body.metadata,
        )  # fmt: skip
        generation = await service.begin(
            request, body.model, 1,
            lambda served: chat_job(served, _conversation(body), _sampling(body)),
        )  # fmt: skip
        shape = ResponseShape(generation, body)
        if body.stream:
            return service.stream(generation, shape.events(), shape.failed)
        (steps,) = await service.collect(request, generation)
        return JSONResponse(shape.whole(steps))

    return routes


def _conversation(body: ResponsesRequest) -> Conversation:
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    else:
        messages += _messages(body.input)
    choice: Any = body.tool_choice
    if isinstance(choice, NamedFunction):
        choice = {"type": "function", "function": {"name": choice.name}}
    return Conversation(
        messages=messages,
        tools=[
            {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}
            for tool in body.tools
        ],
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_format(body),
        effort=body.reasoning.effort,
    )


def _format(body: ResponsesRequest) -> Format:
    given = body.text.format
    if isinstance(given, SchemaFormat):
        return JsonBySchema(type="json_schema", json_schema=JsonSchema(schema=given.definition))
    return given


def _sampling(body: ResponsesRequest) -> Sampling:
    given = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "max_tokens": body.max_output_tokens,
    }
    return Sampling(params={name: value for name, value in given.items() if value is not None})


def _messages(
    items: Iterable[MessageItem | CallItem | CallOutputItem | ReasoningItem],
) -> Iterator[dict[str, Any]]:
    """Items of one answer (reasoning, text, calls) are one message of the assistant."""
    turn: dict[str, Any] = {}
    for item in items:
        added = _of_answer(item)
        if added is None or ("content" in added and ("content" in turn or "tool_calls" in turn)):
            if turn:
                yield {"role": "assistant"} | turn
            turn = {}
        if isinstance(item, CallOutputItem):
            output = _text(item.output)
            yield {"role": "tool", "tool_call_id": item.call_id, "content": output}
        elif added is None:
            assert isinstance(item, MessageItem)
            yield {"role": item.role, "content": _text(item.content)}
        elif "tool_calls" in added:
            turn["tool_calls"] = [*turn.get("tool_calls", []), *added["tool_calls"]]
        else:
            turn |= added
    if turn:
        yield {"role": "assistant"} | turn


def _of_answer(
    item: MessageItem | CallItem | CallOutputItem | ReasoningItem,
) -> dict[str, Any] | None:
    """What an item adds to the assistant's message; None if it is not the assistant's."""
    if isinstance(item, CallItem):
        function = {"name": item.name, "arguments": item.arguments}
        return {"tool_calls": [{"id": item.call_id, "type": "function", "function": function}]}
    if isinstance(item, ReasoningItem):
        return {"reasoning_content": _reasoning(item)}
    if isinstance(item, MessageItem) and item.role == "assistant":
        return {"content": _text(item.content)}
    return None


def _reasoning(item: ReasoningItem) -> str:
    if item.content or item.encrypted_content is None:
        return _text(item.content or item.summary)
    text = decrypted(item.encrypted_content)
    if text is None:
        raise RequestError(
            "a reasoning item has an encrypted_content that is not of this server: leave it out."
        )
    return text


def _text(given: str | list[Part]) -> str:
    return given if isinstance(given, str) else "".join(part.text for part in given)


class ResponseShape:
    """Steps as the objects of the Responses API."""

    def __init__(self, generation: Generation, body: ResponsesRequest) -> None:
        self._generation = generation
        self._items = OutputItems(encrypt=bool(body.include))
        self._sequence = -1
        self._response: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "model": body.model,
            "output": [],
            "error": None,
            "incomplete_details": None,
            "usage": None,
            **body.model_dump(
                by_alias=True,
                include={
                    "instructions", "max_output_tokens", "metadata", "parallel_tool_calls",
                    "reasoning", "store", "temperature", "text", "tool_choice", "tools", "top_p",
                    "truncation",
                },
            ),
        }  # fmt: skip

    async def events(self) -> AsyncGenerator[bytes, None]:
        """response.created ... response.completed or response.incomplete."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event({"type": kind, "response": self._response})
        async with aclosing(self._generation.steps()) as steps:
            async for step in steps:
                for document in self._take(step):
                    yield self._event(document)
        yield self._event(
            {"type": f"response.{self._response['status']}", "response": self._response}
        )

    def whole(self, steps: list[Step]) -> dict[str, Any]:
        """The same as one object."""
        for step in steps:
            for _ in self._take(step):
                pass
        return self._response

    def failed(self, error: ApiError) -> bytes:
        """The last event of a stream that broke off."""
        code = error.code or "server_error"
        self._response |= {
            "status": "failed",
            "error": {"code": code, "message": error.message},
            "output": self._items.items,
        }
        return self._event({"type": "response.failed", "response": self._response})

    def _take(self, step: Step) -> Iterator[dict[str, Any]]:
        for delta in step.deltas:
            yield from self._items.take(delta)
        if step.finish_reason is None:
            return
        cut = step.finish_reason == "length"
        status = "incomplete" if cut else "completed"
        yield from self._items.close(status)
        self._response |= {
            "status": status,
            "output": self._items.items,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        figures = self._generation.figures
        return {
            "input_tokens": figures.prompt_tokens,
            "input_tokens_details": {"cached_tokens": figures.cached_tokens},
            "output_tokens": figures.output_tokens,
            "output_tokens_details": {"reasoning_tokens": figures.reasoning_tokens},
            "total_tokens": figures.prompt_tokens + figures.output_tokens,
        }

    def _event(self, document: dict[str, Any]) -> bytes:
        self._sequence += 1
        return event(document | {"sequence_number": self._sequence}, document["type"])
