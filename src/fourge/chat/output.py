"""The one way from generated text to an answer: reasoning, content, tool calls.

Incremental, and the same for every split of the text: what a delta holds does not depend on where
the text was cut, only when it comes. A tool call ends reasoning. What looks like a call and turns
out to be none stays text; special tokens in a place that has no use for them are dropped. The
protocol is that of GLM-4.7 and GLM-5 (vllm 0.33.0 parser/glm47_moe.py parses the same).
"""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fourge.chat.deltas import Delta, merged
from fourge.chat.reasoning import ReasoningParser
from fourge.chat.tags import CALL, END_CALL, Lexer, Piece
from fourge.chat.tools import ArgumentsParser, CallStart, Tools


class OutputParser:
    """One answer: ``feed`` what is generated, then ``finish`` once.

    tools: of the request, in OpenAI form; without any, tags of calls are text. thinking: the prompt
    leaves <think> open (reasoning.leaves_thinking_open). tool_choice: "auto", "none" (calls are
    dropped), "required", or the named tool in OpenAI form (calls of others are dropped).
    parallel_tool_calls: if not, calls after the first are dropped. tag_ids: of the vocabulary
    (tokens.tag_ids). strict: calls of tools that the request does not have are dropped.

    ``reasoning`` is whether the model is reasoning now, ``num_calls`` the calls that came out,
    ``num_unknown`` those of tools that the request does not have.
    """

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        *,
        tag_ids: Mapping[int, str] | None = None,
        strict: bool = False,
    ) -> None:
        self.num_calls = 0
        self.num_unknown = 0
        self._tools = Tools(list(tools or []))
        self._has_tools = bool(tools)
        self._choice = tool_choice
        self._parallel = parallel_tool_calls
        self._strict = strict
        self._lexer = Lexer(tag_ids)
        self._outside = ReasoningParser(thinking=thinking, tools=self._has_tools)
        self._opening: list[Piece] = []  # <tool_call> and the text after it
        self._arguments: ArgumentsParser | None = None
        self._dropped = False  # the call that is open

    @property
    def reasoning(self) -> bool:
        return self._outside.reasoning

    def feed(self, text: str, token_ids: Sequence[int] | None = None) -> list[Delta]:
        """What is certain after ``text``; ``token_ids`` are the tokens that it was decoded from."""
        pieces = self._lexer.feed(text, token_ids)
        return merged(delta for piece in pieces for delta in self._take(piece))

    def finish(self, finish_reason: str) -> list[Delta]:
        """The rest. Arguments are closed, unless ``finish_reason`` is "length": then a call ends
        where the output was cut, and one without a whole name never was."""
        return merged(self._finish(cut=finish_reason == "length"))

    def _finish(self, *, cut: bool) -> Iterator[Delta]:
        for piece in self._lexer.finish():
            yield from self._take(piece)
        if self._opening and not cut:
            name = self._opening_text().strip()
            yield from self._begin(CallStart(name)) if name in self._tools else self._give_up()
        if self._arguments is not None:
            yield from self._add(self._arguments.cut() if cut else self._arguments.finish())
        yield from self._outside.finish()

    def _take(self, piece: Piece) -> Iterator[Delta]:
        if self._arguments is not None and not self._arguments.begins_another(piece):
            yield from self._add(self._arguments.take(piece))
        elif self._opening:
            yield from self._open(piece)
        elif piece.tag == CALL and self._has_tools:
            if self._arguments is not None:
                yield from self._add(self._arguments.finish())
            self._opening = [piece]
        else:
            yield from self._outside.take(piece)

    def _open(self, piece: Piece) -> Iterator[Delta]:
        """The name goes on, or the piece ends it."""
        if piece.tag is None:
            self._opening.append(piece)
            if not self._tools.may_begin_call(self._opening_text()):
                yield from self._give_up()
        elif start := self._tools.read_start(self._opening_text(), piece.tag):
            yield from self._begin(start)
            yield from self._take(piece)
        elif piece.tag == END_CALL:
            self._opening = []  # a call of nothing
        else:
            yield from self._give_up()
            yield from self._take(piece)

    def _opening_text(self) -> str:
        return "".join(piece.text for piece in self._opening[1:])

    def _give_up(self) -> Iterator[Delta]:
        """It was no call, but text."""
        opening, self._opening = self._opening, []
        for piece in opening:
            yield from self._outside.take(piece)

    def _begin(self, start: CallStart) -> Iterator[Delta]:
        self._opening = []
        self._outside.begin_call()
        self._arguments = ArgumentsParser(self._tools.parameters(start.name), start.key)
        unknown = start.name not in self._tools
        self.num_unknown += unknown
        self._dropped = self._unwanted(start.name) or (unknown and self._strict)
        if not self._dropped:
            self.num_calls += 1
            new_id = f"call_{uuid.uuid4().hex[:24]}"
            yield Delta(index=self.num_calls - 1, id=new_id, name=start.name, arguments="")

    def _unwanted(self, name: str) -> bool:
        if isinstance(self._choice, Mapping):
            if self._choice.get("function", self._choice).get("name") != name:
                return True
        elif self._choice == "none":
            return True
        return self.num_calls > 0 and not self._parallel

    def _add(self, arguments: str) -> Iterator[Delta]:
        assert self._arguments is not None
        if self._arguments.closed:
            self._arguments = None
        if arguments and not self._dropped:
            yield Delta(index=self.num_calls - 1, arguments=arguments)
