"""One tool call as it arrives: its name, then its arguments as JSON.

    <tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>...</tool_call>

String arguments go out as they come, all others when their value is complete; the first value of
an argument counts. Models now and then leave out one of the tags or write one twice; what follows
from the rest is understood all the same (vllm pull request 47190, issue 49248, pull request 54971).
Knows nothing of what stands outside a call.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from fourge.chat.arguments import STRING, Kinds, Parameters, convert, dump, read_parameters
from fourge.chat.tags import CALL, END_CALL, END_KEY, END_VALUE, KEY, VALUE, Piece

# Nothing longer is waited for; OpenAI allows 64.
MAX_NAME_LENGTH = 256
_SPACE_INSIDE = re.compile(r"\S\s+\S")


@dataclass(frozen=True, slots=True)
class CallStart:
    """What stands before the first tag in a call: a name, and a key whose tag was left out."""

    name: str
    key: str = ""


class Tools:
    """The tools of a request by name."""

    def __init__(self, tools: list[Mapping[str, Any]]) -> None:
        functions = [tool.get("function", tool) for tool in tools]
        self._parameters = {
            str(function.get("name")): read_parameters(function.get("parameters"))
            for function in functions
        }

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def parameters(self, name: str) -> Parameters:
        """Of a tool that the request does not have: anything."""
        return self._parameters.get(name, Parameters({}))

    def may_begin_call(self, text: str) -> bool:
        """Whether ``text`` may be, or become, what stands before the first tag of a call."""
        text = text.strip()
        if len(text) > MAX_NAME_LENGTH:
            return False
        return not _SPACE_INSIDE.search(text) or any(
            name.startswith(text)
            or (text.startswith(name) and not _SPACE_INSIDE.search(text.removeprefix(name)))
            for name in self._parameters
        )

    def read_start(self, text: str, tag: str | None) -> CallStart | None:
        """The name before ``tag``; None where a call cannot go on like this."""
        text = text.strip()
        if tag in (KEY, VALUE, END_CALL):
            return CallStart(text) if text else None
        if tag != END_KEY:
            return None
        starts = [
            CallStart(name, text.removeprefix(name).strip())
            for name in self._parameters
            if text.startswith(name) and text != name
        ]
        return max(starts, key=self._likelihood, default=None)

    def _likelihood(self, start: CallStart) -> tuple[bool, int]:
        return start.key in self.parameters(start.name).named, len(start.name)


class _State(Enum):
    BETWEEN = auto()  # before a key, or the end of the call
    IN_KEY = auto()
    AFTER_KEY = auto()
    IN_VALUE = auto()


class ArgumentsParser:
    """Pieces of a call after its name -> JSON of its arguments, as far as it is certain.

    The JSON is whole when ``closed``. ``key``: one whose opening tag was left out.
    """

    def __init__(self, parameters: Parameters, key: str = "") -> None:
        self.closed = False
        self._parameters = parameters
        self._state = _State.IN_KEY if key else _State.BETWEEN
        self._text = key
        self._key = ""
        self._keys: set[str] = set()
        self._dropped = False  # this value has no key, or one that came before
        self._owed = "{"  # certain, but nobody needs it yet
        self._takes = {
            _State.BETWEEN: self._take_between,
            _State.IN_KEY: self._take_in_key,
            _State.AFTER_KEY: self._take_after_key,
            _State.IN_VALUE: self._take_in_value,
        }

    def take(self, piece: Piece) -> str:
        """The JSON that the piece adds."""
        return self._takes[self._state](piece)

    def begins_another(self, piece: Piece) -> bool:
        """Whether the piece begins the next call, so that the end of this one was left out."""
        return piece.tag == CALL and self._state is not _State.IN_VALUE

    def finish(self) -> str:
        """The JSON that is left when the model ends here: values and braces are closed."""
        value = self._end_value() if self._state is _State.IN_VALUE else ""
        self.closed = True
        return value + self._owed + "}"

    def cut(self) -> str:
        """The JSON that is left when the output was cut off: only what the model did say."""
        self.closed = True
        return "" if self._state is _State.IN_VALUE and self._streams() else self._owed

    def _take_between(self, piece: Piece) -> str:
        if piece.tag is None:
            self._text += piece.text
        elif piece.tag == KEY:
            self._state, self._text = _State.IN_KEY, ""
        elif piece.tag == END_KEY and self._text.strip():
            self._end_key()
        elif piece.tag == VALUE:
            self._end_key()
            return self._begin_value()
        elif piece.tag == END_CALL:
            return self.finish()
        return ""

    def _take_in_key(self, piece: Piece) -> str:
        if piece.tag == END_KEY:
            self._end_key()
            return ""
        return self._take_between(piece)

    def _take_after_key(self, piece: Piece) -> str:
        if piece.tag == VALUE:
            return self._begin_value()
        if piece.tag == END_VALUE or (piece.tag is None and piece.text.strip()):
            value = Piece(piece.text.lstrip(), piece.tag)
            return self._begin_value() + self._take_in_value(value)
        if piece.tag in (KEY, END_CALL):
            self._text = ""
            return self._take_between(piece)
        return ""

    def _take_in_value(self, piece: Piece) -> str:
        if piece.tag == END_VALUE:
            return self._end_value()
        if piece.tag == END_CALL:
            return self.finish()
        if self._streams():
            return dump(piece.text)[1:-1]
        self._text += piece.text
        return ""

    def _end_key(self) -> None:
        key = self._text.strip()
        bare = self._state is _State.BETWEEN or key in self._parameters.named
        self._key = key if bare else self._text
        self._state, self._text = _State.AFTER_KEY, ""

    def _begin_value(self) -> str:
        self._state, self._text = _State.IN_VALUE, ""
        self._dropped = not self._key.strip() or self._key in self._keys
        if not self._streams():
            return ""
        begin, self._owed = self._before_value() + '"', '"'
        return begin

    def _end_value(self) -> str:
        self._state = _State.BETWEEN
        value, self._text = self._text, ""
        if self._dropped or self._streams():
            return ""
        before, self._owed = self._before_value(), ""
        return before + convert(value, self._kinds(), self._parameters.strings(self._key))

    def _before_value(self) -> str:
        separator = ", " if self._keys else ""
        self._keys.add(self._key)
        return f"{self._owed}{separator}{dump(self._key)}: "

    def _streams(self) -> bool:
        """Whether the value is sent as it comes: it is a string, and any may come."""
        return (
            not self._dropped
            and self._kinds() == STRING
            and not self._parameters.strings(self._key)
        )

    def _kinds(self) -> Kinds:
        return self._parameters.kinds(self._key)
