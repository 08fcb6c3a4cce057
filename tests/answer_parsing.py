"""Feeding a parser: the tools of the tests, the ways to cut a text, and what came out."""

import re
from collections.abc import Iterable, Iterator

from fourge.chat import Delta, OutputParser, to_message
from fourge.chat.tokens import Detokenizer

STRING = {"type": "string"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "required": ["city"],
                "properties": {
                    "city": STRING,
                    "days": {"type": "integer"},
                    "metric": {"type": "boolean"},
                    "lat": {"type": "number"},
                    "tags": {"type": "array", "items": STRING},
                    "opts": {"type": "object", "properties": {"a": {"type": "integer"}}},
                    "zip": STRING,
                    "maybe": {"type": ["string", "null"]},
                    "u": {"anyOf": [{"type": "integer"}, STRING]},
                    "any": {},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}},
    {
        "type": "function",
        "function": {
            "name": "write_file",
            "parameters": {"type": "object", "properties": {"path": STRING, "content": STRING}},
        },
    },
]
SPELLED = re.compile("~(<[^>]*>)")

# Text and the tokens that it was decoded from, or None where nothing is known of them.
Chunk = tuple[str, list[int] | None]


def parse(
    parser: OutputParser, chunks: Iterable[Chunk], finish: str = "stop"
) -> tuple[dict, list[Delta]]:
    """The message, and all deltas that it came in."""
    deltas = [delta for chunk in chunks for delta in parser.feed(*chunk)]
    deltas += parser.finish(finish)
    for delta in deltas:
        said = [delta.reasoning, delta.content, delta.arguments]
        assert sum(part is not None for part in said) == 1
        assert any(said) or delta.name is not None, "a delta without anything in it"
    assert [d.index for d in deltas if d.name is not None] == list(range(parser.num_calls))
    ids = [delta.id for delta in deltas if delta.id is not None]
    assert len(set(ids)) == len(ids) == parser.num_calls
    return to_message(deltas), deltas


def summary(message: dict) -> tuple[str, str, list[tuple[str, str]]]:
    """Reasoning, content, and names and arguments of the calls."""
    calls = [
        (call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls", [])
    ]
    return message.get("reasoning", ""), message["content"] or "", calls


def tokens_of(tokenizer, text: str) -> list[int]:
    """Token ids; tags with a "~" in front are spelled with ordinary tokens."""
    ids = []
    for number, part in enumerate(SPELLED.split(text)):
        # Alone, the last character of a tag is no part of the next token.
        ids += tokenizer(part, add_special_tokens=False, split_special_tokens=bool(number % 2))[
            "input_ids"
        ]
    return ids


def plain(text: str) -> str:
    """The text as a detokenizer gives it."""
    return SPELLED.sub(r"\1", text)


def token_chunks(tokenizer, ids: list[int], size: int = 1) -> Iterator[Chunk]:
    """Text and ids of ``size`` tokens at a time, as an engine sends them."""
    detokenizer = Detokenizer(tokenizer)
    for start in range(0, len(ids), size):
        group = ids[start : start + size]
        yield "".join(map(detokenizer.feed, group)), group
    if rest := detokenizer.finish():
        yield rest, []
