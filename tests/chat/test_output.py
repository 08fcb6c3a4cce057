"""How an answer is streamed, and what a parser knows besides."""

import re

import pytest

from answer_parsing import TOOLS, parse, summary, token_chunks, tokens_of
from fourge.chat import Delta, OutputParser, to_message
from fourge.chat.deltas import merged, resolve_finish_reason
from fourge.chat.reasoning import leaves_thinking_open
from fourge.chat.tags import Lexer, Piece
from fourge.chat.tokens import tag_ids

PARIS = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>"


def feed(parser: OutputParser, *texts: str) -> list[list[str]]:
    """What each text brings: reasoning, content, names with a "!", and arguments."""
    return [
        [
            d.reasoning or d.content or (f"{d.name}!" if d.name else d.arguments or "")
            for d in parser.feed(text)
        ]
        for text in texts
    ]


def test_a_call_streams_its_name_and_then_strings_as_they_come():
    parser = OutputParser(TOOLS)
    deltas = feed(
        parser, "abc", "</think>", "Let me", " check.", "<tool_call>", "get_weather", "<arg_key>",
        "city", "</arg_key>", "<arg_value>", "Pari", "s", "</arg_value>", "</tool_call>",
    )  # fmt: skip
    assert deltas == [
        ["abc"], [], ["Let me"], [" check."], [], [], ["get_weather!"],
        [], [], ['{"city": "'], ["Pari"], ["s"], [], ['"}'],
    ]  # fmt: skip
    assert parser.finish("stop") == []


def test_a_call_without_arguments_waits_for_its_end():
    parser = OutputParser(TOOLS, thinking=False)
    assert feed(parser, "<tool_call>get_time", "\n", "</tool_call>") == [
        [],
        [],
        ["get_time!", "{}"],
    ]


def test_what_is_no_string_waits_for_its_end():
    parser = OutputParser(TOOLS, thinking=False)
    feed(parser, "<tool_call>get_weather<arg_key>tags</arg_key><arg_value>")
    assert feed(parser, "['a'", "]", "</arg_value>") == [[], [], ['{"tags": ["a"]']]


def test_a_first_piece_is_whole_and_later_ones_have_arguments_only():
    first, *rest = OutputParser(TOOLS, thinking=False).feed(PARIS)
    assert re.fullmatch(r"call_[0-9a-f]{24}", first.id or "")
    assert first == Delta(index=0, id=first.id, name="get_weather", arguments="")
    assert rest == [Delta(index=0, arguments='{"city": "Paris"}')]


def test_only_what_may_be_a_tag_or_blank_is_held_back():
    parser = OutputParser(TOOLS)
    assert feed(parser, "a ", "b<", "c\n", "</thi", "nk>", "\n", "d ", "<", "tool") == [
        ["a"], [" b"], ["<c"], [], [], [], ["\nd "], [], [],
    ]  # fmt: skip
    assert parser.finish("length") == [Delta(content="<tool")]


def test_a_sentence_after_the_tag_is_no_name_and_not_waited_for():
    parser = OutputParser(TOOLS)
    assert feed(parser, "use <tool_call>", " to", " call", " it") == [
        ["use"], [], [" <tool_call> to call"], [" it"],
    ]  # fmt: skip


def test_a_name_without_end_is_no_name():
    parser = OutputParser(TOOLS, thinking=False)
    assert parser.feed("<tool_call>" + 256 * "a") == []
    assert parser.feed("a") == [Delta(content="<tool_call>" + 257 * "a")]


def test_a_tool_may_have_blanks_in_its_name():
    tools = [{"type": "function", "function": {"name": "get the time"}}]
    text = "<tool_call>get the time</tool_call>"
    message, _ = parse(OutputParser(tools, thinking=False), [(letter, None) for letter in text])
    assert summary(message)[2] == [("get the time", "{}")]


def test_of_two_tools_the_longer_name_and_of_two_splits_the_known_key():
    tools = [
        {"function": {"name": name, "parameters": {"properties": {key: {"type": "string"}}}}}
        for name, key in (("get", "_it"), ("get_it", "now"), ("get_i", "tnow"))
    ]
    for text, expected in (
        ("get_itnow", ("get_it", '{"now": "1"}')),
        ("get_it", ("get", '{"_it": "1"}')),
        ("get_itx", ("get_it", '{"x": 1}')),
    ):
        answer = f"<tool_call>{text}</arg_key><arg_value>1</arg_value></tool_call>"
        message, _ = parse(OutputParser(tools, thinking=False), [(answer, None)])
        assert summary(message)[2] == [expected]


def test_choices_side_by_side_do_not_know_of_each_other():
    texts = [f"a</think>{PARIS}", "b</think><tool_call>get_time</tool_call>c"]
    parsers = [OutputParser(TOOLS), OutputParser(TOOLS)]
    deltas: list[list[Delta]] = [[], []]
    for at in range(max(map(len, texts))):
        for number, parser in enumerate(parsers):
            deltas[number] += parser.feed(texts[number][at : at + 1])
    for number, parser in enumerate(parsers):
        deltas[number] += parser.finish("stop")
    assert [summary(to_message(part)) for part in deltas] == [
        ("a", "", [("get_weather", '{"city": "Paris"}')]),
        ("b", "c", [("get_time", "{}")]),
    ]


def test_unknown_tools_are_counted_and_dropped_where_asked():
    text = "<tool_call>nope</tool_call><tool_call>get_time</tool_call><tool_call>no</tool_call>"
    for strict, names in ((False, ["nope", "get_time", "no"]), (True, ["get_time"])):
        parser = OutputParser(TOOLS, thinking=False, strict=strict)
        message, _ = parse(parser, [(text, None)])
        assert [name for name, _ in summary(message)[2]] == names
        assert (parser.num_unknown, parser.num_calls) == (2, len(names))


def test_it_is_known_whether_the_model_is_reasoning():
    parser = OutputParser(TOOLS)
    assert parser.reasoning
    parser.feed("a</thin")
    assert parser.reasoning
    parser.feed("k>")
    assert not parser.reasoning
    assert not OutputParser(TOOLS, thinking=False).reasoning
    called = OutputParser(TOOLS)
    called.feed("a<tool_call>get_time</tool_call>")
    assert not called.reasoning


def test_a_tag_spelled_before_the_tag_itself_is_told_apart_token_by_token(tokenizer):
    ids = tokens_of(tokenizer, "the ~</think> tag</think>Hello")
    for known in (tag_ids(tokenizer), None):
        message, _ = parse(OutputParser(TOOLS, tag_ids=known), token_chunks(tokenizer, ids))
        assert summary(message) == ("the </think> tag", "Hello", [])


def test_the_token_that_ends_a_turn_is_never_shown(tokenizer):
    ids = tokens_of(tokenizer, "a</think><tool_call>get_time</tool_call><|observation|>")
    for size in (1, 100):
        parser = OutputParser(TOOLS, tag_ids=tag_ids(tokenizer))
        message, _ = parse(parser, token_chunks(tokenizer, ids, size))
        assert summary(message) == ("a", "", [("get_time", "{}")])
    spelled, _ = parse(OutputParser(None, False), [("say <|user|>", None)])
    assert spelled["content"] == "say <|user|>"


def test_tags_that_are_no_token_of_a_vocabulary_are_found_by_spelling():
    lexer = Lexer({7: "<think>", 8: "</think>"})
    pieces = [*lexer.feed("a</think>b<tool", [1, 8, 2, 3]), *lexer.feed("_call></think>", [4, 5])]
    assert pieces == [
        Piece("a"),
        Piece("</think>", "</think>", special=True),
        Piece("b"),
        Piece("<tool_call>", "<tool_call>"),
        Piece("</think>"),
    ]
    assert lexer.finish() == []


def test_text_held_back_comes_before_a_special_token():
    lexer = Lexer({7: "<think>"})
    assert lexer.feed("a</arg_", [1]) == [Piece("a")]
    expected = [Piece("</arg_"), Piece("<think>", "<think>", special=True)]
    assert lexer.feed("<think>", [7]) == expected


def test_neighbours_of_one_kind_are_one_delta():
    deltas = [
        Delta(reasoning="a"), Delta(reasoning="b"), Delta(content="c"), Delta(content="d"),
        Delta(index=0, id="x", name="f", arguments=""), Delta(index=0, arguments="{"),
        Delta(index=0, arguments="}"), Delta(index=1, id="y", name="g", arguments=""),
        Delta(index=1, arguments="{}"), Delta(content="e"),
    ]  # fmt: skip
    assert merged(deltas) == [
        Delta(reasoning="ab"),
        Delta(content="cd"),
        Delta(index=0, id="x", name="f", arguments=""),
        Delta(index=0, arguments="{}"),
        Delta(index=1, id="y", name="g", arguments=""),
        Delta(index=1, arguments="{}"),
        Delta(content="e"),
    ]


def test_the_message_has_what_there_is_and_both_names_of_reasoning():
    assert to_message([]) == {"role": "assistant", "content": None}
    first = Delta(index=0, id="call_1", name="f", arguments="")
    deltas = [Delta(reasoning="R"), first, Delta(index=0, arguments="{}"), Delta(content="C")]
    assert to_message(deltas) == {
        "role": "assistant",
        "content": "C",
        "reasoning": "R",
        "reasoning_content": "R",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        ],
    }


@pytest.mark.parametrize(
    ("reason", "num_calls", "told"),
    [("stop", 0, "stop"), ("stop", 2, "tool_calls"), ("length", 1, "length")],
)
def test_a_natural_stop_after_a_call_is_tool_calls(reason, num_calls, told):
    assert resolve_finish_reason(reason, num_calls) == told


@pytest.mark.parametrize(
    ("prompt", "thinking"),
    [
        ("[gMASK]<sop><|user|>Hi<|assistant|><think>", True),
        ("[gMASK]<sop><|user|>Hi<|assistant|></think>", False),
        ("<|user|>what is <think>?<|assistant|></think>", False),
        ("<|assistant|><think>R</think>A<|user|>Hi<|assistant|><think>R so far", True),
        ("<|user|>Hi<|assistant|><think>R</think>A so far", False),
        ("<|user|>\nHi/nothink<|assistant|>\n<think></think>", False),
    ],
)
def test_the_prompt_tells_whether_thinking_is_open(prompt, thinking):
    assert leaves_thinking_open(prompt) is thinking


def test_an_enumerated_string_waits_for_its_end_and_loses_its_blanks():
    """Grammars of xgrammar's let blanks come around it; a string of any kind keeps them."""
    properties = {"unit": {"enum": ["celsius", "kelvin"]}, "city": {"type": "string"}}
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}
    ]
    text = (
        "</think><tool_call>f<arg_key>unit</arg_key><arg_value> celsius\n</arg_value>"
        "<arg_key>city</arg_key><arg_value> Paris </arg_value></tool_call>"
    )
    for at in range(len(text)):
        message, _ = parse(OutputParser(tools), [(text[:at], None), (text[at:], None)])
        assert summary(message)[2] == [("f", '{"unit": "celsius", "city": " Paris "}')]
    cut = text[: text.index("sius")]
    message, _ = parse(OutputParser(tools), [(letter, None) for letter in cut], "length")
    assert summary(message)[2] == [("f", "{")]  # half of a value would be none of them
