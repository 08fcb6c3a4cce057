"""parse_record: which records are usable, which are bad and how the bad ones are counted."""

import pytest

from fourge.calibrate.records import (
    MAX_EXAMPLES,
    Record,
    Tally,
    count_record,
    parse_line,
    parse_record,
    without_nulls,
)
from fourge.chat.template import MessageError

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f"}}


def parse(raw):
    return parse_record(raw, "here:1", 100)


@pytest.mark.parametrize("key", ["messages", "conversation"])
def test_a_conversation_has_two_names(key):
    assert parse({key: [USER]}) == Record("here:1", messages=[USER])


def test_text_and_token_ids_are_taken_as_they_are():
    assert parse({"text": " a "}) == Record("here:1", text=" a ")
    assert parse({"input_ids": [0, 99]}) == Record("here:1", input_ids=[0, 99])


def test_messages_come_before_text_and_null_counts_as_absent():
    assert parse({"text": "a", "messages": [USER]}).messages == [USER]
    assert parse({"text": "a", "messages": None}).text == "a"


def test_tools_and_messages_may_be_json_text():
    record = parse({"messages": '[{"role": "user", "content": "Hi"}]', "tools": '[{"a": 1}]'})
    assert record == Record("here:1", messages=[USER], tools=[{"a": 1}])


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_no_tools_have_many_spellings(tools):
    assert parse({"messages": [USER], "tools": tools}).tools is None


def test_a_toxic_record_is_left_out_and_a_harmless_one_is_not():
    assert parse({"conversation": [USER], "toxic": True}) is None
    assert parse({"conversation": [USER], "toxic": False}).messages == [USER]


BAD = [
    ([USER], "not an object", "no JSON object"),
    ({"prompt": "x", "id": 1}, "no known key", "keys id, prompt, needed one of messages, conv"),
    ({}, "no known key", "keys none"),
    ({"text": 5}, "bad text", "not a string"),
    ({"text": " \n"}, "empty", "text is empty"),
    ({"messages": []}, "empty", "list of messages is empty"),
    ({"messages": [{"role": "user", "content": " "}]}, "empty", "no message has any content"),
    ({"messages": [{"role": "bot", "content": "x"}]}, "unknown role", '"bot"'),
    ({"messages": "[{"}, "bad messages", "its messages are not JSON"),
    ({"messages": [USER], "tools": "{"}, "bad tools", "its tools are not JSON"),
    ({"messages": [USER], "tools": ["f"]}, "bad tools", "not a list of objects"),
    ({"input_ids": []}, "empty", "input_ids are empty"),
    ({"input_ids": [1, True]}, "bad input_ids", "not a list of integers"),
    ({"input_ids": [1, 2.0]}, "bad input_ids", "not a list of integers"),
    ({"input_ids": [1, 100]}, "bad input_ids", "hold 100, the vocabulary is 0 to 99"),
    ({"input_ids": [-1]}, "bad input_ids", "hold -1"),
]


@pytest.mark.parametrize(("raw", "kind", "words"), BAD)
def test_an_unusable_record_is_refused_by_kind(raw, kind, words):
    with pytest.raises(MessageError) as caught:
        parse(raw)
    assert caught.value.kind == kind
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{broken\n", "is not JSON"),
        (b'{"text": "\xff"}\n', "is not UTF-8"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_line_that_is_not_json_says_so(line, words):
    with pytest.raises(MessageError, match=words) as caught:
        parse_line(line)
    assert caught.value.kind == "not JSON"


def test_a_byte_order_mark_is_no_fault():
    assert parse_line(b'\xef\xbb\xbf{"text": "a"}\n') == {"text": "a"}


def test_nulls_of_a_table_are_dropped_at_every_depth():
    row = {"a": None, "b": [{"c": None, "d": 0}], "e": {"f": None}}
    assert without_nulls(row) == {"b": [{"d": 0}], "e": {}}


def test_the_tally_counts_all_and_keeps_the_first_bad_ones():
    tally = Tally()
    for number in range(1, 31):
        assert count_record(lambda: {"text": ""}, f"f:{number}", tally, 100) is None
    assert count_record(lambda: {"text": "a"}, "f:31", tally, 100) == Record("f:31", text="a")
    assert count_record(lambda: {"toxic": True}, "f:32", tally, 100) is None
    assert (tally.records, tally.filtered, dict(tally.bad)) == (32, 1, {"empty": 30})
    assert [bad.where for bad in tally.examples] == [f"f:{n}" for n in range(1, MAX_EXAMPLES + 1)]
    assert tally.examples[0].reason == "its text is empty"
