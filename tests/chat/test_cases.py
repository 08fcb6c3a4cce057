"""Every case of cases.toml, cut in every way, gives the same answer."""

import json
import tomllib
from pathlib import Path

import pytest

from answer_parsing import TOOLS, parse, plain, summary, token_chunks, tokens_of
from fourge.chat import OutputParser
from fourge.chat.tokens import tag_ids

CASES = tomllib.loads((Path(__file__).parent / "cases.toml").read_text(encoding="utf-8"))["case"]


def fields(case: dict) -> tuple:
    calls = [tuple(call) for call in case.get("calls", [])]
    return case.get("reasoning", ""), case.get("content", ""), calls


def run(case: dict, chunks, **options) -> tuple:
    parser = OutputParser(
        TOOLS if case.get("tools", True) else None,
        case.get("thinking", True),
        case.get("tool_choice", "auto"),
        case.get("parallel_tool_calls", True),
        **options,
    )
    return summary(parse(parser, chunks, case.get("finish", "stop"))[0])


@pytest.fixture(params=CASES, ids=lambda case: case["name"])
def case(request) -> dict:
    return request.param


@pytest.fixture
def by_ids(case) -> tuple:
    """What a case must give where token ids are given."""
    return fields(case | case.get("by_ids", {}))


def test_arguments_are_json_unless_cut(case):
    for variant in (case, case | case.get("by_ids", {})):
        for _, arguments in fields(variant)[2]:
            if case.get("finish") != "length":
                assert isinstance(json.loads(arguments), dict)


def test_whole(case):
    assert run(case, [(plain(case["input"]), None)]) == fields(case)


def test_by_character(case):
    assert run(case, [(letter, None) for letter in plain(case["input"])]) == fields(case)


def test_every_cut_in_two(case):
    text = plain(case["input"])
    for at in range(1, len(text)):
        chunks = [(text[:at], None), (text[at:], None)]
        assert run(case, chunks) == fields(case), (text[:at], text[at:])


def test_by_token_without_ids(case, tokenizer):
    chunks = token_chunks(tokenizer, tokens_of(tokenizer, case["input"]))
    assert run(case, [(text, None) for text, _ in chunks]) == fields(case)


@pytest.mark.parametrize("known", [True, False], ids=["ids known", "ids not known"])
def test_by_token_with_ids(case, by_ids, known, tokenizer):
    chunks = token_chunks(tokenizer, tokens_of(tokenizer, case["input"]))
    assert run(case, chunks, tag_ids=tag_ids(tokenizer) if known else None) == by_ids


@pytest.mark.parametrize("size", [2, 3, 4, 10_000])
def test_several_tokens_at_once(case, by_ids, size, tokenizer):
    """As speculative decoding sends them; 10,000: all in one delta."""
    chunks = token_chunks(tokenizer, tokens_of(tokenizer, case["input"]), size)
    assert run(case, chunks, tag_ids=tag_ids(tokenizer)) == by_ids


def test_tokens_cut_in_two(case, by_ids, tokenizer):
    ids = tokens_of(tokenizer, case["input"])
    singles = list(token_chunks(tokenizer, ids))
    for at in range(1, len(ids)):
        chunks = [
            ("".join(text for text, _ in part), [token for _, ids in part for token in ids])
            for part in (singles[:at], singles[at:])
        ]
        assert run(case, chunks, tag_ids=tag_ids(tokenizer)) == by_ids


def test_a_text_decoded_without_special_tokens(case, by_ids, tokenizer):
    """Then the ids alone tell of the tags."""
    tags = tag_ids(tokenizer)
    chunks = token_chunks(tokenizer, tokens_of(tokenizer, case["input"]))
    chunks = [("" if ids and ids[0] in tags else text, ids) for text, ids in chunks]
    assert run(case, chunks, tag_ids=tags) == by_ids
