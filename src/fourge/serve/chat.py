"""POST /v1/chat/completions: OpenAI's chat, streamed or whole, from the same steps."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from fourge.chat.deltas import Delta, to_message
from fourge.engine.request import TokenLogprobs
from fourge.serve.answer import Step
from fourge.serve.bodies import body_route
from fourge.serve.errors import openai_body
from fourge.serve.generation import Generation
from fourge.serve.preparing import Conversation, Sampling, chat_job
from fourge.serve.protocol.openai import ChatRequest, NamedTool
from fourge.serve.served import Served, finite
from fourge.serve.service import Service
from fourge.serve.streaming import DONE, event, label


def router(service: Service) -> APIRouter:
    """The routes of this surface."""
    routes = APIRouter(tags=["OpenAI"], route_class=body_route(service.limits.max_messages))

    @routes.post("/v1/chat/completions", response_model=None)
    async def create(request: Request, body: ChatRequest) -> Response:
        label(
            request, user=body.user, safety_identifier=body.safety_identifier,
            prompt_cache_key=body.prompt_cache_key, metadata=body.metadata,
        )  # fmt: skip
        generation = await service.begin(
            request, body.model, body.n,
            lambda served: chat_job(served, conversation_of(body), sampling_of(body)),
        )  # fmt: skip
        shape = ChatShape(service.served, generation, body)
        if body.stream:
            return service.stream(
                generation, shape.events(), lambda error: event(openai_body(error)) + DONE
            )
        steps = await service.collect(request, generation)
        return JSONResponse(shape.whole(steps))

    return routes


def conversation_of(body: ChatRequest) -> Conversation:
    """The request as the template takes it."""
    choice: Any = body.tool_choice
    return Conversation(
        messages=body.rendered_messages(),
        tools=body.rendered_tools(),
        tool_choice=choice.model_dump() if isinstance(choice, NamedTool) else choice,
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=body.response_format,
        template_options=body.chat_template_kwargs,
        effort=body.reasoning_effort,
        thinking_budget=body.thinking_token_budget,
        continue_final_message=body.continue_final_message,
    )


def sampling_of(body: ChatRequest) -> Sampling:
    """The request as the engine takes it."""
    params = body.sampling()
    if body.most_tokens is not None:
        params["max_tokens"] = body.most_tokens
    if body.logprobs:
        params["logprobs"] = body.top_logprobs or 0
    return Sampling(
        params=params,
        n=body.n,
        stop=body.stop_strings,
        include_stop=body.include_stop_str_in_output,
        bad_words=body.bad_words,
    )


class ChatShape:
    """Steps as OpenAI's objects."""

    def __init__(self, served: Served, generation: Generation, body: ChatRequest) -> None:
        self._served, self._generation, self._body = served, generation, body
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": body.model,
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The stream: role, deltas, finish, usage if it is wanted, [DONE]."""
        options, figures = self._body.stream_options, self._generation.figures
        for index in range(len(self._generation.answers)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async with aclosing(self._generation.steps()) as steps:
            async for step in steps:
                for document in self._chunks(step):
                    yield document
        if options.include_usage:
            last = self._head | {"choices": [], "usage": figures.usage()}
            metrics = figures.speculation()
            yield event(last | {"metrics": metrics} if metrics else last)
        yield DONE

    def whole(self, steps: list[list[Step]]) -> dict[str, Any]:
        """The same as one object."""
        figures = self._generation.figures
        document = self._head | {
            "choices": [self._choice(index, own) for index, own in enumerate(steps)],
            "usage": figures.usage(),
        }
        metrics = figures.speculation()
        return document | {"metrics": metrics} if metrics else document

    def _choice(self, index: int, steps: list[Step]) -> dict[str, Any]:
        return {
            "index": index,
            "message": to_message(delta for step in steps for delta in step.deltas),
            "logprobs": self._logprobs([one for step in steps for one in step.logprobs]),
            "finish_reason": steps[-1].finish_reason,
            "stop_reason": steps[-1].stop_reason,
        }

    def _chunks(self, step: Step) -> list[bytes]:
        """One chunk a delta; log probabilities go with the first."""
        logprobs = self._logprobs(step.logprobs) if step.logprobs else None
        deltas = [_delta(delta) for delta in step.deltas] or ([{}] if logprobs else [])
        chunks = []
        for delta in deltas:
            chunks.append(self._chunk(step.index, delta, logprobs=logprobs))
            logprobs = None
        if step.finish_reason is not None:
            end = {"finish_reason": step.finish_reason, "stop_reason": step.stop_reason}
            chunks.append(self._chunk(step.index, {}, **end))
        return chunks

    def _chunk(self, index: int, delta: dict[str, Any], **rest: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | rest
        document = self._head | {"choices": [choice]}
        options = self._body.stream_options
        if options.continuous_usage_stats:
            document["usage"] = self._generation.figures.usage()
        elif options.include_usage:
            document["usage"] = None
        return event(document)

    def _logprobs(self, tokens: list[TokenLogprobs]) -> dict[str, Any] | None:
        """Of every token of the answer, reasoning and tags included."""
        if not self._body.logprobs:
            return None
        return {"content": [self._token(one) for one in tokens], "refusal": None}

    def _token(self, one: TokenLogprobs) -> dict[str, Any]:
        top = one.top[: self._body.top_logprobs or 0]
        return self._named(one.token_id, one.logprob) | {
            "top_logprobs": [self._named(token, logprob) for token, logprob in top]
        }

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._served.token_text(token)
        return {
            "token": text,
            "logprob": finite(logprob),
            "bytes": list(text.encode("utf-8", "replace")),
        }


def _delta(delta: Delta) -> dict[str, Any]:
    if delta.content is not None:
        return {"content": delta.content}
    if delta.reasoning is not None:
        return {"reasoning": delta.reasoning, "reasoning_content": delta.reasoning}
    if delta.name is None:
        return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.arguments}}]}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {
        "tool_calls": [
            {"index": delta.index, "id": delta.id, "type": "function", "function": function}
        ]
    }
