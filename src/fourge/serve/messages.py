"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API over the same steps.

Messages become OpenAI's form, which the templates know; reasoning is a thinking block, a call a
tool_use block. Thinking is off unless the request (or the server's options) turns it on.
"""

import json
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from fourge.chat.deltas import Delta
from fourge.chat.template import unknown_options
from fourge.serve.answer import Step
from fourge.serve.bodies import body_route
from fourge.serve.errors import anthropic_body
from fourge.serve.generation import Generation
from fourge.serve.preparing import Conversation, Sampling, chat_job
from fourge.serve.protocol.anthropic import (
    AnthropicMessage,
    AnthropicTool,
    CountRequest,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from fourge.serve.protocol.fields import JsonBySchema, JsonSchema
from fourge.serve.served import Served
from fourge.serve.service import Service
from fourge.serve.streaming import event, label
from fourge.serve.tokens import conversation_tokens

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def router(service: Service) -> APIRouter:
    """The routes of this surface."""
    routes = APIRouter(tags=["Anthropic"], route_class=body_route(service.limits.max_messages))

    @routes.post("/v1/messages", response_model=None)
    async def create(request: Request, body: MessagesRequest) -> Response:
        label(request, user=body.metadata.user_id)
        generation = await service.begin(
            request, body.model, 1,
            lambda served: chat_job(served, _conversation(served, body), _sampling(body)),
        )  # fmt: skip
        shape = MessageShape(generation, body)
        if body.stream:
            request_id = request.scope["state"]["request_id"]
            return service.stream(
                generation,
                shape.events(),
                lambda error: event(anthropic_body(error, request_id), "error"),
            )
        (steps,) = await service.collect(request, generation)
        return JSONResponse(shape.whole(steps))

    @routes.post("/v1/messages/count_tokens")
    async def count(body: CountRequest) -> dict[str, int]:
        served = service.served
        served.check_name(body.model)
        tokens = await service.in_worker(
            lambda: conversation_tokens(served, _conversation(served, body))
        )
        return {"input_tokens": len(tokens)}

    return routes


def _conversation(served: Served, body: CountRequest) -> Conversation:
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system)})
    for message in body.messages:
        messages += _openai_messages(message)
    choice = body.tool_choice
    named = {"type": "function", "function": {"name": choice.name}}
    choices: dict[str, Any] = {"any": "required", "tool": named}
    form = body.output_config.format
    return Conversation(
        messages=messages,
        tools=[_tool(tool) for tool in body.tools],
        tool_choice=choices.get(choice.type, choice.type),
        parallel_tool_calls=not choice.disable_parallel_tool_use,
        response_format=form
        and JsonBySchema(type="json_schema", json_schema=JsonSchema(schema=form.definition)),
        effort=body.output_config.effort,
        template_options=_template_options(served, body),
        thinking_budget=body.thinking.budget_tokens if body.thinking else None,
    )


def _template_options(served: Served, body: CountRequest) -> dict[str, Any]:
    """Thinking as the request has it, where the template can tell; reasoning kept if it says so."""
    options: dict[str, Any] = {}
    if body.thinking is not None:
        options["enable_thinking"] = body.thinking.type != "disabled"
    elif "enable_thinking" not in served.template_options:
        options["enable_thinking"] = False
    if body.context_management.edits:
        options["clear_thinking"] = False
    cannot_tell = "enable_thinking" in unknown_options(served.tokenizer, ["enable_thinking"])
    if cannot_tell and (body.thinking is None or body.thinking.type != "disabled"):
        options.pop("enable_thinking", None)
    return options


def _sampling(body: MessagesRequest) -> Sampling:
    names = ("temperature", "top_p", "top_k", "max_tokens")
    given = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    return Sampling(params=given, stop=tuple(text for text in body.stop_sequences if text))


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    known = {name: value for name, value in function.items() if value is not None}
    outer = {} if tool.defer_loading is None else {"defer_loading": tool.defer_loading}
    return {"type": "function", "function": known} | outer


def _openai_messages(message: AnthropicMessage) -> Iterator[dict[str, Any]]:
    """One message of Anthropic's may hold several results and a text: as many of OpenAI's."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    rest: dict[str, Any] = {"role": message.role, "content": ""}
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in message.content:
        if isinstance(block, ToolResultBlock):
            yield _result(block)
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": json.dumps(block.input)}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        else:
            rest["content"] += block.text
    rest |= {"reasoning_content": "".join(thoughts)} if thoughts else {}
    rest |= {"tool_calls": calls} if calls else {}
    if len(rest) > 2 or rest["content"]:
        yield rest


def _result(block: ToolResultBlock) -> dict[str, Any]:
    parts: Any = block.content
    if not isinstance(parts, str):
        parts = [part.model_dump(exclude_none=True) for part in parts]
    elif block.is_error:
        parts = [{"type": "text", "text": parts}]
    if block.is_error:  # templates have no place for it but the text
        parts = [{"type": "text", "text": "Error: "}, *parts]
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": parts}


def _text(given: str | list[TextBlock]) -> str:
    return given if isinstance(given, str) else "\n".join(block.text for block in given)


class MessageShape:
    """Steps as Anthropic's objects."""

    def __init__(self, generation: Generation, body: MessagesRequest) -> None:
        self._generation = generation
        self._hides_thinking = bool(body.thinking and body.thinking.display == "omitted")
        self._head = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": body.model,
        }
        self._blocks = 0
        self._open: str | int | None = None  # the block's kind; of a call its number

    async def events(self) -> AsyncGenerator[bytes, None]:
        """message_start, blocks, message_delta, message_stop."""
        usage = {"input_tokens": self._generation.figures.prompt_tokens, "output_tokens": 0}
        start = self._head | {
            "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage,
        }  # fmt: skip
        yield event({"type": "message_start", "message": start}, "message_start")
        async with aclosing(self._generation.steps()) as steps:
            async for step in steps:
                for delta in step.deltas:
                    for document in self._block_events(delta):
                        yield event(document, document["type"])
                if step.finish_reason is not None:
                    for document in [*self._close(), self._end(step), {"type": "message_stop"}]:
                        yield event(document, document["type"])

    def whole(self, steps: list[Step]) -> dict[str, Any]:
        """The same as one object: the deltas put together, in the order of their coming."""
        content: list[dict[str, Any]] = []
        for step in steps:
            for delta in step.deltas:
                for document in self._block_events(delta):
                    _put_together(content, document)
        for block in content:
            if block["type"] == "tool_use":
                block["input"] = _input(block["input"])
        end = self._end(steps[-1])
        return self._head | {"content": content} | end["delta"] | {"usage": end["usage"]}

    def _block_events(self, delta: Delta) -> Iterator[dict[str, Any]]:
        if delta.reasoning is not None:
            kind, block = "thinking", {"type": "thinking", "thinking": "", "signature": ""}
            piece = {"type": "thinking_delta", "thinking": delta.reasoning}
            if self._hides_thinking:
                return
        elif delta.content is not None:
            kind, block = "text", {"type": "text", "text": ""}
            piece = {"type": "text_delta", "text": delta.content}
        else:
            kind = delta.index
            block = {"type": "tool_use", "id": delta.id, "name": delta.name, "input": {}}
            piece = {"type": "input_json_delta", "partial_json": delta.arguments}
        if kind != self._open:
            yield from self._close()
            self._open = kind
            yield {"type": "content_block_start", "index": self._blocks, "content_block": block}
        if "" not in piece.values():
            yield {"type": "content_block_delta", "index": self._blocks, "delta": piece}

    def _close(self) -> Iterator[dict[str, Any]]:
        if self._open is not None:
            yield {"type": "content_block_stop", "index": self._blocks}
            self._blocks += 1
            self._open = None

    def _end(self, step: Step) -> dict[str, Any]:
        figures = self._generation.figures
        sequence = step.stop_reason if isinstance(step.stop_reason, str) else None
        reason = "stop_sequence" if sequence else STOP_REASONS[step.finish_reason or "stop"]
        return {
            "type": "message_delta",
            "delta": {"stop_reason": reason, "stop_sequence": sequence},
            "usage": {
                "input_tokens": figures.prompt_tokens - figures.cached_tokens,
                "cache_read_input_tokens": figures.cached_tokens,
                "cache_creation_input_tokens": 0,
                "output_tokens": figures.output_tokens,
            },
        }


def _put_together(content: list[dict[str, Any]], document: dict[str, Any]) -> None:
    """Apply an event of a stream, as clients do."""
    if document["type"] == "content_block_start":
        block = document["content_block"]
        content.append(block | ({"input": ""} if block["type"] == "tool_use" else {}))
    elif document["type"] == "content_block_delta":
        delta = document["delta"]
        if delta["type"] == "input_json_delta":
            content[-1]["input"] += delta["partial_json"]
        else:
            name = delta["type"].removesuffix("_delta")
            content[-1][name] += delta[name]


def _input(text: str) -> Any:
    """The arguments; {} for those that were cut, which are no JSON (stop_reason is max_tokens)."""
    try:
        return json.loads(text or "{}")
    except ValueError:
        return {}
