"""What a parsed answer is made of, piece by piece, and the message that the pieces add up to.

A stream sends the pieces, anything else the message: there is no second way to parse.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """One of three: reasoning, content, or a piece of the tool call ``index`` (0 = first).

    The first piece of a call has id, name and empty arguments; the others have arguments only,
    which are JSON when put together. What a piece does not have is None.
    """

    reasoning: str | None = None
    content: str | None = None
    index: int | None = None
    id: str | None = None
    name: str | None = None
    arguments: str | None = None


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """The same with neighbours of one kind put together; a call's first piece stays by itself."""
    result: list[Delta] = []
    for delta in deltas:
        last = result[-1] if result else Delta()
        if last.reasoning is not None and delta.reasoning is not None:
            result[-1] = replace(last, reasoning=last.reasoning + delta.reasoning)
        elif last.content is not None and delta.content is not None:
            result[-1] = replace(last, content=last.content + delta.content)
        elif (
            last.arguments is not None
            and delta.arguments is not None
            and last.index == delta.index
            and last.name is delta.name is None
        ):
            result[-1] = replace(last, arguments=last.arguments + delta.arguments)
        else:
            result.append(delta)
    return result


def to_message(deltas: Iterable[Delta]) -> dict[str, Any]:
    """The assistant's message in OpenAI form.

    content is None where there is none; reasoning stands under both of its names (``reasoning``,
    ``reasoning_content``) and, like tool_calls, is absent where there is none.
    """
    reasoning, content = "", ""
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        reasoning += delta.reasoning or ""
        content += delta.content or ""
        if delta.index is None:
            continue
        if delta.name is not None:
            function = {"name": delta.name, "arguments": ""}
            calls[delta.index] = {"id": delta.id, "type": "function", "function": function}
        calls[delta.index]["function"]["arguments"] += delta.arguments or ""
    message: dict[str, Any] = {"role": "assistant", "content": content or None}
    if reasoning:
        message |= {"reasoning": reasoning, "reasoning_content": reasoning}
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    return message


def resolve_finish_reason(finish_reason: str, num_calls: int) -> str:
    """What clients are told: a natural stop after a tool call is "tool_calls"."""
    return "tool_calls" if finish_reason == "stop" and num_calls else finish_reason
