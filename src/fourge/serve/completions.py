"""POST /v1/completions: plain text after plain text, with log probabilities of both."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from fourge.engine.params import StructuredOutputs
from fourge.engine.request import TokenLogprobs
from fourge.serve.answer import Step
from fourge.serve.bodies import body_route
from fourge.serve.constraints import answer_format
from fourge.serve.errors import openai_body
from fourge.serve.generation import Generation
from fourge.serve.preparing import Job, Sampling, text_job
from fourge.serve.protocol.openai import CompletionRequest
from fourge.serve.served import Served, finite
from fourge.serve.service import Service
from fourge.serve.streaming import DONE, event, label


def router(service: Service) -> APIRouter:
    """The routes of this surface."""
    routes = APIRouter(tags=["OpenAI"], route_class=body_route(service.limits.max_messages))

    @routes.post("/v1/completions", response_model=None)
    async def create(request: Request, body: CompletionRequest) -> Response:
        label(request, user=body.user)
        generation = await service.begin(
            request, body.model, body.n * len(body.prompts), lambda served: _job(served, body)
        )
        shape = CompletionShape(service.served, generation, body)
        if body.stream:
            return service.stream(
                generation, shape.events(), lambda error: event(openai_body(error)) + DONE
            )
        return JSONResponse(shape.whole(await service.collect(request, generation)))

    return routes


def _job(served: Served, body: CompletionRequest) -> Job:
    params = body.sampling()
    # The engine generates one token at least; of 0 nothing is shown.
    params["max_tokens"] = max(1, body.max_tokens)
    params["logprobs"] = body.logprobs
    params["prompt_logprobs"] = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        params["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    sampling = Sampling(
        params=params,
        n=body.n,
        stop=body.stop_strings,
        include_stop=body.include_stop_str_in_output,
        bad_words=body.bad_words,
    )
    form = answer_format(body.response_format)
    structured = None
    if form is not None:
        structured = StructuredOutputs(structural_tag={"type": "structural_tag", "format": form})
    return text_job(served, body.prompts, sampling, structured)


class CompletionShape:
    """Steps as OpenAI's objects."""

    def __init__(self, served: Served, generation: Generation, body: CompletionRequest) -> None:
        self._served, self._generation, self._body = served, generation, body
        self._lengths = [0] * len(generation.answers)  # of the text so far, for text_offset
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The stream: text, usage if it is wanted, [DONE]."""
        options, figures = self._body.stream_options, self._generation.figures
        async with aclosing(self._generation.steps()) as steps:
            async for step in steps:
                choice = self._choice(step.index, [step])
                if choice["text"] or choice["logprobs"] or choice["finish_reason"]:
                    document = self._head | {"choices": [choice]}
                    if options.continuous_usage_stats:
                        document["usage"] = self._usage()
                    yield event(document)
        if options.include_usage:
            last = self._head | {"choices": [], "usage": self._usage()}
            metrics = figures.speculation()
            yield event(last | {"metrics": metrics} if metrics else last)
        yield DONE

    def whole(self, steps: list[list[Step]]) -> dict[str, Any]:
        """The same as one object."""
        choices = [self._choice(index, own) for index, own in enumerate(steps)]
        document = self._head | {"choices": choices, "usage": self._usage()}
        metrics = self._generation.figures.speculation()
        return document | {"metrics": metrics} if metrics else document

    def _choice(self, index: int, steps: Sequence[Step]) -> dict[str, Any]:
        """What these steps of an answer give."""
        prompt_logprobs = next(
            (step.prompt_logprobs for step in steps if step.prompt_logprobs is not None), None
        )
        shown: list[TokenLogprobs | None] = []
        text = ""
        if self._body.echo and self._lengths[index] == 0:
            text = self._prompt(index)
            shown = list(prompt_logprobs or [])
        if self._body.max_tokens:
            text += "".join(delta.content or "" for step in steps for delta in step.deltas)
            shown += [one for step in steps for one in step.logprobs]
        reason = steps[-1].finish_reason
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": None if self._body.logprobs is None else self._logprobs(index, shown),
            "finish_reason": "length" if reason and not self._body.max_tokens else reason,
            "stop_reason": steps[-1].stop_reason,
        }
        self._lengths[index] += len(text)
        if self._body.prompt_logprobs is not None and prompt_logprobs is not None:
            choice["prompt_logprobs"] = [self._by_token(one) for one in prompt_logprobs]
        return choice

    def _prompt(self, index: int) -> str:
        prompt = self._body.prompts[self._generation.job.choices[index][0]]
        return prompt if isinstance(prompt, str) else str(self._served.tokenizer.decode(prompt))

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """OpenAI's four lists. The first token of a prompt has no probability."""
        offset = self._lengths[index]
        prompt = self._generation.job.prompts[self._generation.job.choices[index][0]]
        found: dict[str, Any] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip
        for one in tokens:
            name = self._served.token_text(prompt[0] if one is None else one.token_id)
            found["tokens"].append(name)
            found["token_logprobs"].append(one and finite(one.logprob))
            found["top_logprobs"].append(one and self._top(one))
            found["text_offset"].append(offset)
            offset += len(name)
        return found

    def _top(self, one: TokenLogprobs) -> dict[str, float]:
        """The best, and the token that stands there, as OpenAI gives them."""
        best = one.top[: self._body.logprobs]
        pairs = [*best, (one.token_id, one.logprob)]
        return {self._served.token_text(token): finite(logprob) for token, logprob in pairs}

    def _by_token(self, one: TokenLogprobs | None) -> dict[str, Any] | None:
        """vllm's form of prompt_logprobs: token id -> logprob, rank where it is known, text."""
        if one is None:
            return None
        most = self._body.prompt_logprobs
        ranked: dict[int, tuple[float, int | None]] = {
            token: (logprob, rank) for rank, (token, logprob) in enumerate(one.top[:most], start=1)
        }
        ranked.setdefault(one.token_id, (one.logprob, None))
        return {
            str(token): {
                "logprob": finite(logprob),
                "rank": rank,
                "decoded_token": self._served.token_text(token),
            }
            for token, (logprob, rank) in ranked.items()
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._generation.figures.usage()
        if not self._body.max_tokens:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage
