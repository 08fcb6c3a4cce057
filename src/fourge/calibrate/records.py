"""One record of calibration data: checked, and made a conversation, a text or token ids.

A record is a conversation (``messages`` or ``conversation``, with ``tools``), a ``text`` or
``input_ids``. A bad one is counted in a ``Tally`` with its place and passed over; one marked
``toxic`` (WildChat) is left out on purpose. Knows nothing of files, tokenizers and passes.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fourge.chat.template import Message, MessageError, has_content, normalise
from fourge.chat.tokens import first_line

CONTENT_KEYS = ("messages", "conversation", "text", "input_ids")
KNOWN_KEYS = (*CONTENT_KEYS, "tools", "toxic")
MAX_EXAMPLES = 20


class Record(NamedTuple):
    """A usable record: exactly one of messages (normalised), text and input_ids is set."""

    where: str
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    input_ids: list[int] | None = None


class BadRecord(NamedTuple):
    """Why and where a record cannot be used."""

    where: str
    kind: str
    reason: str


@dataclass
class Tally:
    """What has been met in one source so far; records counts the bad and filtered ones too."""

    records: int = 0
    filtered: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    examples: list[BadRecord] = field(default_factory=list)

    def reject(self, where: str, kind: str, reason: str) -> None:
        self.bad[kind] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(BadRecord(where, kind, reason))


def count_record(
    read: Callable[[], object], where: str, tally: Tally, vocab_size: int
) -> Record | None:
    """The record that ``read`` gives, or None and a note in the tally."""
    tally.records += 1
    try:
        record = parse_record(read(), where, vocab_size)
    except MessageError as error:
        tally.reject(where, error.kind, str(error))
        return None
    tally.filtered += record is None
    return record


def parse_record(raw: object, where: str, vocab_size: int) -> Record | None:
    """Check one record; None if it is marked toxic. Raises MessageError with the kind of fault."""
    if not isinstance(raw, Mapping):
        raise MessageError("not an object", "the record is no JSON object")
    if raw.get("toxic") is True:
        return None
    key = next((key for key in CONTENT_KEYS if raw.get(key) is not None), None)
    if key is None:
        seen = ", ".join(sorted(map(str, raw))[:8]) or "none"
        raise MessageError(
            "no known key", f"it has the keys {seen}, needed one of {', '.join(CONTENT_KEYS)}"
        )
    value = raw[key]
    if key == "text":
        if not isinstance(value, str):
            raise MessageError("bad text", "its text is not a string")
        if not value.strip():
            raise MessageError("empty", "its text is empty")
        return Record(where, text=value)
    if key == "input_ids":
        return Record(where, input_ids=_check_ids(value, vocab_size))
    messages = normalise(_parsed(value, "bad messages", key))
    if not has_content(messages):
        raise MessageError("empty", "no message has any content")
    return Record(where, messages=messages, tools=_check_tools(raw.get("tools")))


def parse_line(line: bytes | str) -> object:
    try:
        return json.loads(line if isinstance(line, str) else line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise MessageError("not JSON", "the line is not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise MessageError("not JSON", f"the line is not JSON ({first_line(error)})") from error


def without_nulls(value: Any) -> Any:
    """Parquet gives every row the keys of all rows; the ones that a row lacks are null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _check_ids(value: object, vocab_size: int) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise MessageError("bad input_ids", "its input_ids are not a list of integers")
    if not value:
        raise MessageError("empty", "its input_ids are empty")
    if min(value) < 0 or max(value) >= vocab_size:
        outside = next(token for token in value if not 0 <= token < vocab_size)
        raise MessageError(
            "bad input_ids",
            f"its input_ids hold {outside}, the vocabulary is 0 to {vocab_size - 1}",
        )
    return value


def _check_tools(value: object) -> list[dict[str, Any]] | None:
    tools = _parsed(value, "bad tools", "tools")
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise MessageError("bad tools", "its tools are not a list of objects")
    return tools


def _parsed(value: object, kind: str, key: str) -> object:
    """Columns of Parquet files often hold a list as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise MessageError(kind, f"its {key} are not JSON ({first_line(error)})") from error
