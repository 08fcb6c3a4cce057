"""Nonsense never raises, never loses text, and gives the same answer however it is cut."""

import json
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from answer_parsing import TOOLS, parse, summary, token_chunks
from fourge.chat import OutputParser
from fourge.chat.tags import STOPS, TAGS
from fourge.chat.tokens import tag_ids

BOUNDED = settings(deadline=None, derandomize=True, max_examples=250)
PARTS = [
    *TAGS, *TAGS, *STOPS, "<", "</", "<tool", "</arg_", "_call>", "k", "get_time", "get_weather",
    "city", "days", "any", "1", '{"a": [', "'", '"', "\\", " ", "\n", "\ufffd", "\u00e9", "@",
]  # fmt: skip
OPTIONS = st.fixed_dictionaries(
    {
        "tools": st.sampled_from([TOOLS, TOOLS, None, []]),
        "thinking": st.booleans(),
        "tool_choice": st.sampled_from(
            ["auto", "auto", "none", "required", {"function": {"name": "get_time"}}]
        ),
        "parallel_tool_calls": st.booleans(),
        "strict": st.booleans(),
    }
)
FINISH = st.sampled_from(["stop", "stop", "length", "abort"])


@st.composite
def nonsense(draw) -> str:
    """Markers and fragments of them; every "@" becomes a word of its own."""
    text = "".join(draw(st.lists(st.sampled_from(PARTS), max_size=25)))
    words = (f"w{number}w" for number in range(100))
    return re.sub("@", lambda _: next(words), text)


def check_arguments(calls, finish):
    if finish != "length":
        for _, arguments in calls:
            assert isinstance(json.loads(arguments), dict)


@BOUNDED
@given(nonsense(), OPTIONS, FINISH, st.data())
def test_markers_in_any_order(text, options, finish, data):
    whole, _ = parse(OutputParser(**options), [(text, None)], finish)
    reasoning, content, calls = summary(whole)
    check_arguments(calls, finish)
    for word in re.findall(r"w\d+w", re.sub(r"(?s)<tool_call>.*?(</tool_call>|$)", "", text)):
        assert word in reasoning + content
    by_character, _ = parse(OutputParser(**options), [(letter, None) for letter in text], finish)
    assert summary(by_character) == summary(whole)
    cut = data.draw(st.integers(0, len(text)))
    halves, _ = parse(OutputParser(**options), [(text[:cut], None), (text[cut:], None)], finish)
    assert summary(halves) == summary(whole)


@BOUNDED
@given(nonsense(), st.booleans(), FINISH)
def test_without_tools_only_think_tags_and_blanks_go(text, thinking, finish):
    message, _ = parse(OutputParser(None, thinking), [(text, None)], finish)
    reasoning, content, calls = summary(message)
    assert calls == []
    rest = re.sub(r"\s|</?think>", "", text)
    assert re.sub(r"\s|</?think>", "", reasoning + content) == rest


@BOUNDED
@given(st.lists(st.integers(0, 2047), max_size=30), OPTIONS, FINISH, st.integers(1, 5))
def test_any_tokens_at_all(tokenizer, ids, options, finish, size):
    ids = [token if token % 3 else 2037 + token % 10 for token in ids]
    parser = OutputParser(**options, tag_ids=tag_ids(tokenizer))
    message, _ = parse(parser, token_chunks(tokenizer, ids), finish)
    check_arguments(summary(message)[2], finish)
    several = OutputParser(**options, tag_ids=tag_ids(tokenizer))
    assert summary(parse(several, token_chunks(tokenizer, ids, size), finish)[0]) == summary(
        message
    )


@BOUNDED
@given(st.binary(max_size=60), OPTIONS, FINISH)
def test_any_bytes_at_all(raw, options, finish):
    text = raw.decode("utf-8", errors="replace")
    chunks = [(letter, None) for letter in text]
    reasoning, content, calls = summary(parse(OutputParser(**options), chunks, finish)[0])
    assert (reasoning + content, calls) == (text, [])
