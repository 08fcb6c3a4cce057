"""Messages in OpenAI form -> the prompt text, through the checkpoint's own chat template.

``normalise`` mends what templates trip over: tool-call arguments as JSON strings, null contents,
lists of parts, the several names of reasoning and of roles. It never changes its input. The text
protocol itself (tags, which reasoning is kept, tool calls) is the template's business, not ours.
"""

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError

from fourge.chat.arguments import SURROGATE, strict_json
from fourge.chat.tokens import first_line
from fourge.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Message = dict[str, Any]

# The role that a message may name -> the role that templates know.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}

# What a tool is given for the server, not for the model.
_NOT_SHOWN = ("defer_loading", "strict")


class MessageError(DataError):
    """A conversation that cannot be rendered; ``kind`` groups such errors for counting."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def normalise(messages: object, tools: Sequence[Mapping[str, Any]] | None = None) -> list[Message]:
    """Copies of the messages in the one form that templates understand.

    role: one of system, user, assistant, tool. content: always a string. tool_calls: OpenAI form
    with arguments as a dict, absent where there are none. reasoning_content: a string or absent.
    Other keys are kept. A tool message with several results becomes as many messages; a reference
    to one of the ``tools`` becomes its JSON. Raises MessageError, which names the message by its
    place (1 = first).
    """
    if not isinstance(messages, list):
        raise MessageError("bad messages", f"messages is {_kind_of(messages)}, needed a list")
    if not messages:
        raise MessageError("empty", "the list of messages is empty")
    return [
        normalised
        for place, message in enumerate(messages, start=1)
        for normalised in _normalise_message(message, place, tools or [])
    ]


def has_content(messages: Sequence[Message]) -> bool:
    """Whether any of the normalised messages says or calls anything."""
    return any(str(message["content"]).strip() or "tool_calls" in message for message in messages)


def render(
    tokenizer: "Tokenizer",
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    options: Mapping[str, Any] | None = None,
) -> str:
    """The prompt text of normalised messages. continue_final_message: it ends within the last one.

    ``options`` are the template's own (enable_thinking, clear_thinking). Raises CheckpointError if
    the checkpoint has no chat template or a malformed one, MessageError if it refuses the messages
    or has no such option.
    """
    if not tokenizer.chat_template:
        raise CheckpointError(
            "the checkpoint has no chat template (chat_template.jinja, or chat_template in"
            " tokenizer_config.json), but the data has conversations: add the model's template, or"
            " use records of text or input_ids."
        )
    if unknown := unknown_options(tokenizer, options or {}):
        raise MessageError(
            "unknown option", f"the chat template has no option {', '.join(unknown)}: leave it out"
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] if tools else None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **(options or {}),
        )
    except TemplateSyntaxError as error:
        raise CheckpointError(
            f"the checkpoint's chat template is malformed (line {error.lineno}:"
            f" {first_line(error)}): fetch the model's template again."
        ) from error
    # A template is a program of the checkpoint that runs on foreign data: it may raise anything.
    except Exception as error:
        raise MessageError(
            "refused by the template", f"the chat template refuses it: {first_line(error)}"
        ) from error
    assert isinstance(text, str)
    if SURROGATE.search(text):
        raise MessageError("bad content", "a message holds half of a character (a lone surrogate)")
    return text


def unknown_options(tokenizer: "Tokenizer", options: Iterable[str]) -> list[str]:
    """Those that the checkpoint's template never speaks of, or that are not the template's to take:
    transformers would ignore the first and obey the second (chat_template, tokenize)."""
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else "\n".join(template.values())
    reserved = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    return sorted(
        name
        for name in options
        if name in reserved or not re.search(rf"\b{re.escape(name)}\b", text)
    )


def _normalise_message(
    message: object, place: int, tools: Sequence[Mapping[str, Any]]
) -> list[Message]:
    """One message, or for a tool message with several results as many."""
    if not isinstance(message, Mapping):
        raise MessageError("bad messages", f"message {place} is {_kind_of(message)}, not an object")
    result = {str(key): value for key, value in message.items() if value is not None}
    role = result.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise MessageError(
            "unknown role",
            f"message {place} has role {json.dumps(role, default=str)}, known are"
            f" {', '.join(ROLES)}",
        )
    result["role"] = ROLES[role]
    content = result.get("content", "")
    reasoning = result.pop("reasoning", None)
    reasoning = result.pop("reasoning_content", reasoning)
    if result["role"] == "assistant" and isinstance(content, list):
        content, thoughts = _without_thoughts(content)
        reasoning = thoughts if reasoning is None else reasoning
    contents = [content]
    if result["role"] == "tool" and isinstance(content, list):
        contents = list(_results(content, place, tools)) or [""]
    if reasoning is not None:
        result["reasoning_content"] = _text(reasoning, place)
    calls = result.pop("tool_calls", None) or []
    if not isinstance(calls, list):
        raise MessageError(
            "bad tool calls", f"tool_calls of message {place} is {_kind_of(calls)}, not a list"
        )
    # The form before tool_calls: one call, named function_call.
    legacy = result.pop("function_call", None)
    calls = [_normalise_call(call, place) for call in [*calls, *([legacy] if legacy else [])]]
    if calls:
        result["tool_calls"] = calls
    return [result | {"content": _text(content, place)} for content in contents]


def _without_thoughts(parts: list[Any]) -> tuple[list[Any], str | None]:
    """The other parts of an answer, and what its parts of type "thinking" (Anthropic form) say."""
    thoughts, others = [], []
    for part in parts:
        thought = part.get("thinking") if isinstance(part, Mapping) else None
        (others if thought is None else thoughts).append(part if thought is None else thought)
    return others, "".join(map(str, thoughts)) if thoughts else None


def _results(
    parts: list[Any], place: int, tools: Sequence[Mapping[str, Any]]
) -> Iterator[str | list[Any]]:
    """The contents of a tool message: each ``output`` and each reference to a tool is a result of
    its own, as GLM templates have it; parts of text next to each other are one."""
    texts: list[Any] = []
    for part in parts:
        output = None
        if isinstance(part, Mapping) and part.get("type") == "tool_reference":
            output = _referred_tool(part.get("tool_name"), place, tools)
        elif isinstance(part, Mapping):
            output = part.get("output")
        if output is None:
            texts.append(part)
            continue
        if texts:
            yield texts
            texts = []
        yield output
    if texts:
        yield texts


def _referred_tool(name: object, place: int, tools: Sequence[Mapping[str, Any]]) -> str:
    """A tool that a search has found, in the form of the templates that know such references."""
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == name:
            shown = {key: function[key] for key in function if key not in _NOT_SHOWN}
            return f"<tools>\n{json.dumps(shown, ensure_ascii=False)}\n</tools>"
    raise MessageError(
        "bad content",
        f"message {place} refers to the tool {json.dumps(name, default=str)}, which is not among"
        " the tools",
    )


def _text(content: object, place: int) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise MessageError(
            "bad content", f"message {place} has {_kind_of(content)} as content, needed text"
        )
    parts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else None
            raise MessageError(
                "bad content",
                f"message {place} has a part of type {json.dumps(kind, default=str)} in its"
                " content, needed text",
            )
        parts.append(text)
    return "".join(parts)


def _normalise_call(call: object, place: int) -> dict[str, Any]:
    """A tool call in OpenAI form; bare {"name", "arguments"} is accepted too."""
    bare = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(bare, Mapping) or not isinstance(bare.get("name"), str):
        raise MessageError("bad tool calls", f"a tool call of message {place} names no function")
    arguments = bare.get("arguments")
    if isinstance(arguments, str):
        arguments = _parse_arguments(arguments, bare["name"], place)
    elif arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise MessageError(
            "bad tool arguments",
            f"message {place} calls {bare['name']} with {_kind_of(arguments)} as arguments, needed"
            " an object",
        )
    outer = dict(call) if call is not bare and isinstance(call, Mapping) else {}
    return {"type": "function"} | outer | {"function": {**bare, "arguments": dict(arguments)}}


def _parse_arguments(text: str, name: str, place: int) -> object:
    if not text.strip():
        return {}  # what OpenAI-compatible servers send for a call without arguments
    try:
        return strict_json(text)
    except (ValueError, RecursionError) as error:
        raise MessageError(
            "bad tool arguments",
            f"message {place} calls {name} with arguments that are not JSON ({first_line(error)})",
        ) from error


def _kind_of(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    numbers = {int: "a number", float: "a number", type(None): "null"}
    return (names | numbers).get(type(value), type(value).__name__)
