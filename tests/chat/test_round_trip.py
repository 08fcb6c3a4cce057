"""parse(render(message)) == message, with hostile strings everywhere, however it is cut."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from answer_parsing import SPELLED, TOOLS, parse, plain, token_chunks, tokens_of
from fourge.chat import OutputParser
from fourge.chat.arguments import strict_json
from fourge.chat.reasoning import leaves_thinking_open
from fourge.chat.tags import TAGS
from fourge.chat.template import normalise, render
from fourge.chat.tokens import tag_ids

BOUNDED = settings(deadline=None, derandomize=True, max_examples=80)
QUESTION = [{"role": "user", "content": "Hi"}]
# What breaks parsers: the beginnings and ends of tags, what JSON escapes, blanks, other scripts.
FRAGMENTS = [
    *(tag[:size] for tag in TAGS for size in (1, 2, 5, len(tag) - 1)),
    *(tag[1:] for tag in TAGS),
    *('"', "\\", '\\"', "\\n", "\n", "\t", " ", "{", "}", "[", "]", ", ", ": ", "'", "\0", "&lt;"),
    *("null", "true", "1", "1.0", "NaN", "city", "get_time"),
    *("\u00e9", "\u6f22", "\U0001f642", "\u2028"),
]  # fmt: skip
SPELLED_TAGS = [f"~{tag}" for tag in TAGS]


def hostile(fragments: list[str]) -> st.SearchStrategy[str]:
    """Strings without a whole tag, unless it is marked as spelled."""
    characters = st.characters(exclude_characters="~", exclude_categories=["Cs"])
    letters = st.text(characters, max_size=3)
    joined = st.lists(st.sampled_from(fragments) | letters, max_size=8).map("".join)
    return joined.filter(lambda text: not any(tag in SPELLED.sub("", text) for tag in TAGS))


def reads_as(*kinds: type):
    """Whether a string, written raw, is the JSON of another kind: no schema could tell."""

    def check(text: str) -> bool:
        try:
            return isinstance(strict_json(SPELLED.sub(r"\1", text)), kinds)
        except ValueError:
            return False

    return check


@st.composite
def messages(draw, strings: st.SearchStrategy[str]) -> dict:
    """An assistant's message in the form of ``to_message``, arguments as values."""
    scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
    scalars = scalars.filter(lambda value: value not in (float("inf"), -float("inf")))
    values = st.recursive(
        scalars | strings,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3),
        max_leaves=5,
    )
    untyped = values.filter(
        lambda value: (
            not isinstance(value, str)
            or not reads_as(dict, list, bool, int, float, type(None))(value)
        )
    )
    keys = strings.filter(lambda key: key.strip() and key.strip() not in declared)
    declared = {
        "city": strings,
        "days": st.integers(),
        "metric": st.booleans(),
        "lat": st.floats(allow_nan=False, allow_infinity=False),
        "tags": st.lists(strings, max_size=3),
        "opts": st.dictionaries(strings, values, max_size=3),
        "zip": strings,
        "maybe": st.none() | strings.filter(lambda text: not reads_as(type(None))(text)),
        "u": st.integers() | strings.filter(lambda text: not reads_as(int, float)(text)),
        "any": untyped,
    }
    calls = st.one_of(
        st.tuples(
            st.just("get_weather"),
            st.builds(
                lambda known, others: known | others,
                st.fixed_dictionaries({}, optional=declared),
                st.dictionaries(keys, untyped, max_size=2),
            ),
        ),
        st.tuples(st.just("get_time"), st.just({})),
        st.tuples(
            st.just("write_file"), st.fixed_dictionaries({"path": strings, "content": strings})
        ),
        st.tuples(st.just("no.such-tool"), st.dictionaries(keys, untyped, max_size=2)),
    )
    return {
        "role": "assistant",
        "reasoning_content": draw(strings).strip(),
        "content": draw(strings).strip(),
        "tool_calls": [
            {"type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in draw(st.lists(calls, max_size=3))
        ],
    }


def rendered(tokenizer, message: dict) -> str:
    """What the model would have to write for the message, after the prompt's <|assistant|>."""
    prompt = render(tokenizer, QUESTION, TOOLS, add_generation_prompt=True)
    assert leaves_thinking_open(prompt)
    text = render(tokenizer, [*QUESTION, *normalise([message])], TOOLS)
    before = prompt.removesuffix("<think>")
    assert text.startswith(before)
    return text.removeprefix(before)


def unmarked(value):
    """The value with the marks of spelled tags taken out of its strings."""
    if isinstance(value, str):
        return SPELLED.sub(r"\1", value)
    if isinstance(value, dict):
        return {unmarked(key): unmarked(item) for key, item in value.items()}
    return [unmarked(item) for item in value] if isinstance(value, list) else value


def comparable(message: dict) -> list:
    """A message without ids; values as JSON, which tells 1 from 1.0 and True."""
    message = normalise([message])[0]
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return [
        message.get("reasoning_content", ""),
        message["content"],
        *([call["name"], json.dumps(unmarked(call["arguments"]))] for call in calls),
    ]


@BOUNDED
@given(messages(hostile(FRAGMENTS)), st.data())
def test_text_cut_anywhere(tokenizer, message, data):
    text = rendered(tokenizer, message)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6).map(sorted), label="cuts")
    edges = [0, *cuts, len(text)]
    chunks = [(text[a:b], None) for a, b in pairwise(edges)]
    parsed, deltas = parse(OutputParser(TOOLS), chunks)
    assert comparable(parsed) == comparable(message)
    for letters in ([(text, None)], [(letter, None) for letter in text]):
        again, _ = parse(OutputParser(TOOLS), letters)
        assert comparable(again) == comparable(parsed)
    assert len(deltas) <= 4 * len(chunks) + 12 * (1 + len(message["tool_calls"]))


@pytest.mark.parametrize("known", [True, False], ids=["ids known", "ids not known"])
@BOUNDED
@given(message=messages(hostile(FRAGMENTS + 3 * SPELLED_TAGS)))
def test_strings_with_whole_tags_by_token_ids(tokenizer, known, message):
    ids = tokens_of(tokenizer, rendered(tokenizer, message))
    parser = OutputParser(TOOLS, tag_ids=tag_ids(tokenizer) if known else None)
    parsed, _ = parse(parser, token_chunks(tokenizer, ids))
    expected = comparable(message)
    assert comparable(parsed) == [unmarked(expected[0]), unmarked(expected[1]), *expected[2:]]


def test_the_marks_do_what_they_say(tokenizer):
    tags = tag_ids(tokenizer)
    assert not tags.keys() & set(tokens_of(tokenizer, "~</think>"))
    assert tags.keys() & set(tokens_of(tokenizer, "</think>"))
    assert plain("a ~</think>") == tokenizer.decode(tokens_of(tokenizer, "a ~</think>"))
