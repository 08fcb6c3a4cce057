"""One answer on its way: tokens -> text -> reasoning, content and calls, cut at stop strings.

The same steps are streamed or put together: there is no second way to an answer.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from fourge.chat.deltas import Delta, merged, resolve_finish_reason
from fourge.chat.output import OutputParser
from fourge.chat.tokens import Detokenizer
from fourge.engine.async_engine import Update
from fourge.engine.request import TokenLogprobs
from fourge.serve.preparing import Job
from fourge.serve.served import Served
from fourge.serve.stops import StopStrings


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one step of the engine gave answer ``index``. ``stop_reason``: the string or token that
    ended it, None for the end of the turn.
    """

    index: int
    deltas: list[Delta]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Answer:
    """Takes what the engine gives. ``num_tokens`` and ``num_reasoning`` are counted on the way."""

    def __init__(self, served: Served, job: Job, index: int) -> None:
        self.index = index
        self.params = job.choices[index][1]
        self.num_tokens = self.num_reasoning = 0
        self._served = served
        self._detokenizer = Detokenizer(served.tokenizer)
        self._stops = StopStrings(job.sampling.stop, include=job.sampling.include_stop)
        parsing = job.parsing
        self.parser = parsing and OutputParser(
            parsing.tools,
            parsing.thinking,
            parsing.tool_choice,
            parsing.parallel_tool_calls,
            tag_ids=served.tag_ids,
        )
        self._spelled = parsing is not None and parsing.spelled

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found: what the engine still gives is of no use."""
        return self._stops.found is not None

    def take(self, update: Update) -> Step:
        """The next step; its finish_reason says whether it is the last."""
        deltas: list[Delta] = []
        taken = 0
        for token in update.token_ids:
            taken += 1
            ends = update.finish_reason == "stop" and taken == len(update.token_ids)
            early = self.num_tokens + taken < self.params.min_tokens
            found = self._read(token, ends=ends)
            deltas += found if early else self._cut(found)
            if self.stopped:
                break
        reason, stop_reason = update.finish_reason, None
        if self.stopped:
            reason, stop_reason = "stop", self._stops.found
        elif reason is not None:
            deltas += self._cut(self._finish(reason))
            if self.stopped:  # by the last held-back text
                reason, stop_reason = "stop", self._stops.found
            elif reason == "stop" and update.token_ids[-1] in self.params.stop_token_ids:
                stop_reason = update.token_ids[-1]
        if reason is not None:
            deltas += [Delta(content=text)] if (text := self._stops.finish()) else []
            reason = resolve_finish_reason(reason, self.parser.num_calls if self.parser else 0)
        self.num_tokens += taken
        return Step(
            index=self.index,
            deltas=merged(deltas),
            token_ids=update.token_ids[:taken],
            logprobs=update.logprobs[:taken],
            prompt_logprobs=update.prompt_logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
        )

    def _read(self, token: int, *, ends: bool) -> list[Delta]:
        """What a token adds, before stop strings. One that ends the turn has no text, nor has a
        special one that is no tag."""
        if self.parser is not None and self.parser.reasoning:
            self.num_reasoning += 1
        is_tag = self.parser is not None and token in self._served.tag_ids
        if ends or (token in self._served.special_ids and not is_tag):
            return []
        return self._parse(self._detokenizer.feed(token), [token])

    def _finish(self, reason: str) -> list[Delta]:
        deltas = self._parse(self._detokenizer.finish(), None)
        return deltas + (self.parser.finish(reason) if self.parser else [])

    def _parse(self, text: str, tokens: list[int] | None) -> list[Delta]:
        if self.parser is not None:
            return self.parser.feed(text, None if self._spelled else tokens)
        return [Delta(content=text)] if text else []

    def _cut(self, deltas: Iterable[Delta]) -> Iterator[Delta]:
        """Stop strings apply to content, within one stretch of it."""
        for delta in deltas:
            if self.stopped:
                return
            if delta.content is None:
                if text := self._stops.finish():
                    yield Delta(content=text)
                yield delta
            elif text := self._stops.feed(delta.content):
                yield Delta(content=text)
