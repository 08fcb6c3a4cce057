"""Tools and response_format -> what the output must look like, as a structural tag of xgrammar's.

Reasoning comes first and is free but for its length; then JSON, or tool calls in the model's own
form (xgrammar.get_model_structural_tag, "glm_4_7"). Without a demand there is no grammar.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import xgrammar

from fourge.chat.tags import END_THINK, TAGS
from fourge.chat.tokens import first_line
from fourge.engine.params import StructuredOutputs
from fourge.errors import RequestError
from fourge.serve.protocol.fields import ByTag, JsonBySchema, JsonObject, PlainText

ToolChoice = Literal["none", "auto", "required"] | dict[str, Any]
Format = PlainText | JsonObject | JsonBySchema | ByTag | None


class Reasoning(NamedTuple):
    """That the prompt leaves <think> open, and the most tokens to think with."""

    tag_ids: Mapping[int, str]
    budget: int | None


class Constraint(NamedTuple):
    """What the engine has to keep to; None: nothing. ``spelled``: the grammar is one of text, which
    ordinary tokens may spell as well, and no text but a tag can spell a tag.
    """

    outputs: StructuredOutputs | None
    spelled: bool


def constraint(
    tools: Sequence[Mapping[str, Any]],
    tool_choice: ToolChoice,
    response_format: Format,
    *,
    parallel: bool,
    reasoning: Reasoning | None,
) -> Constraint:
    """RequestError: the tools or the format cannot be used.

    Tools are binding if the choice says so or one of them is strict. With both, an answer is
    either calls or what the format says.
    """
    answer = answer_format(response_format)
    calls = None
    forced = tool_choice not in ("auto", "none")
    strict = any(tool["function"].get("strict") for tool in tools)
    if tools and (forced or (tool_choice == "auto" and (strict or answer is not None))):
        # An answer in JSON has no room for text beside the calls.
        choice: ToolChoice = tool_choice if forced or answer is None else "required"
        calls = _calls(tools, choice, parallel=parallel)
    parts = [calls] if forced else [part for part in (answer, calls) if part is not None]
    if not parts:
        if reasoning is None or reasoning.budget is None:
            return Constraint(None, False)
        parts = [{"type": "any_tokens"}]
    found = parts[0] if len(parts) == 1 else {"type": "or", "elements": parts}
    if reasoning is not None:
        first = _spelled_reasoning(reasoning) if calls else _reasoning_tokens(reasoning)
        found = {"type": "sequence", "elements": [first, found]}
    tag = {"type": "structural_tag", "format": found}
    return Constraint(StructuredOutputs(structural_tag=tag), calls is not None)


def _reasoning_tokens(reasoning: Reasoning) -> dict[str, Any]:
    """Up to the token </think>; when the budget is used up, it is all that may come."""
    ends = [token for token, tag in reasoning.tag_ids.items() if tag == END_THINK]
    if not ends:
        raise RequestError(f"the vocabulary has no token {END_THINK}: turn thinking off.")
    free = {
        "type": "any_tokens",
        "exclude_tokens": sorted(reasoning.tag_ids),
        "max_tokens": reasoning.budget,
    }
    return {"type": "sequence", "elements": [free, {"type": "token", "token": ends[0]}]}


def _spelled_reasoning(reasoning: Reasoning) -> dict[str, Any]:
    free = {"type": "any_text", "excludes": list(TAGS), "max_tokens": reasoning.budget}
    return {"type": "tag", "begin": "", "content": free, "end": END_THINK}


def answer_format(response_format: Format) -> dict[str, Any] | None:
    """The format of the answer itself; None if it is free."""
    if isinstance(response_format, JsonObject):
        return {"type": "json_schema", "json_schema": {"type": "object"}}
    if isinstance(response_format, JsonBySchema):
        return {"type": "json_schema", "json_schema": response_format.json_schema.definition}
    return response_format.format if isinstance(response_format, ByTag) else None


def _calls(
    tools: Sequence[Mapping[str, Any]], choice: ToolChoice, *, parallel: bool
) -> dict[str, Any]:
    # "strict" false would let the arguments be anything.
    binding: list[Any] = [
        {**tool, "function": {**tool["function"], "strict": True}} for tool in tools
    ]
    try:
        tag = xgrammar.get_model_structural_tag(
            "glm_4_7", tools=binding, tool_choice=choice, reasoning="disabled",
            parallel_tool_calls=parallel,
        )  # fmt: skip
    except (ValueError, TypeError, KeyError) as error:
        raise RequestError(f"the tools cannot be made a grammar: {first_line(error)}.") from error
    return tag.model_dump()["format"]
