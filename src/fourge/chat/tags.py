"""Generated text -> plain text and the tags of the GLM protocol, in pieces as it arrives.

Every tag is one special token of the vocabulary, so token ids tell a tag from text that only spells
it. Where ids are not given, spelling decides, and what may become a tag is held back until it is
one or is not. A delta of one token is exact; in a delta of several that holds tags and spells some
too, ids and text are aligned by order. Knows the tags, not what they mean.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
KEY, END_KEY = "<arg_key>", "</arg_key>"
VALUE, END_VALUE = "<arg_value>", "</arg_value>"
THINK_TAGS = (THINK, END_THINK)
TAGS = (*THINK_TAGS, CALL, END_CALL, KEY, END_KEY, VALUE, END_VALUE)
# What ends a turn; never shown, and never anything but a special token.
STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")

# An argument may spell these before the one that closes it.
_LATE = (END_KEY, END_VALUE, END_CALL)


class Piece(NamedTuple):
    """Plain text (``tag`` is None), or a tag; ``special`` if token ids say so, not spelling."""

    text: str
    tag: str | None = None
    special: bool = False


class Lexer:
    """Holds back the beginning of a tag that is spelled, and nothing else.

    ``tag_ids``: token id -> tag, of the checkpoint's vocabulary (tokens.tag_ids). Tags that have no
    id are found by spelling. Without ``tag_ids``, the text of a lone token tells whether it is a
    tag, since no ordinary token spells one, and deltas of several tokens go by spelling.
    """

    def __init__(self, tag_ids: Mapping[int, str] | None = None) -> None:
        self._tag_ids = tag_ids
        known = TAGS if tag_ids is None else tag_ids.values()
        self._without_id = tuple(tag for tag in TAGS if tag not in known)
        self._held = ""

    def feed(self, text: str, token_ids: Sequence[int] | None = None) -> list[Piece]:
        """The pieces that are certain now; ``token_ids`` are the tokens that made ``text``."""
        if not token_ids or (self._tag_ids is None and len(token_ids) > 1):
            return self._spelled(text, TAGS)
        if self._tag_ids is None:
            tags = [tag for tag in (*TAGS, *STOPS) if text.endswith(tag)]
        else:
            tags = [self._tag_ids[token] for token in token_ids if token in self._tag_ids]
        pieces = []
        start = 0
        for at, tag in _locate(text, tags):
            pieces += [*self._spelled(text[start:at], self._without_id), *self.finish()]
            pieces.append(Piece(tag, tag, special=True))
            start = at + len(tag)
        return [*pieces, *self._spelled(text[start:], self._without_id)]

    def finish(self) -> list[Piece]:
        """What was held back: text after all."""
        held, self._held = self._held, ""
        return [Piece(held)] if held else []

    def _spelled(self, text: str, tags: Sequence[str]) -> list[Piece]:
        text = self._held + text
        start = text.rfind("<")  # every tag has one, in front
        tail = text[start:] if start >= 0 else ""
        held = tail and tail not in tags and any(tag.startswith(tail) for tag in tags)
        self._held = tail if held else ""
        text = text.removesuffix(self._held)
        parts = re.split(f"({'|'.join(tags)})", text) if tags else [text]
        return [Piece(part, part if part in tags else None) for part in parts if part]


def _locate(text: str, tags: Iterable[str]) -> list[tuple[int, str]]:
    """Where the special tokens ``tags`` stand in ``text``, which may spell tags besides.

    All of them in their order, each the first of its kind that is possible, but what closes a part
    of a call the last. A text that was decoded without special tokens gets them in front.
    """
    if not text:
        return [(0, tag) for tag in tags]
    latest = []
    limit = len(text)
    for tag in reversed(list(tags)):
        at = text.rfind(tag, 0, limit)
        if at >= 0:
            latest.append((at, tag))
            limit = at
    found = []
    start = 0
    for last, tag in reversed(latest):
        at = last if tag in _LATE else text.index(tag, start)
        found.append((at, tag))
        start = at + len(tag)
    return found
