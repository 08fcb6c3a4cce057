"""Data becomes kinds, and kinds share the tokens."""

import json
from pathlib import Path

import pytest

from fourge.calibrate.corpus import build_corpus
from fourge.errors import DataError
from fourge.evaluate.windows import kinds_of, pass_specs, windows_of


def write_ids(path: Path, lengths: list[int]) -> Path:
    lines = [json.dumps({"input_ids": list(range(length))}) for length in lengths]
    path.write_text("\n".join(lines))
    return path


def test_kinds_come_from_names(tmp_path: Path):
    folder = tmp_path / "sets"
    folder.mkdir()
    code, chat = write_ids(folder / "code.jsonl", [5]), write_ids(folder / "chat.jsonl", [5])
    assert kinds_of([str(code)]) == {"code": (str(code),)}
    assert set(kinds_of([str(folder)])) == {"code", "chat"}
    assert kinds_of([f"mixed={code}", f"mixed={chat}"]) == {"mixed": (str(code), str(chat))}
    assert set(kinds_of(["org/corpus:test"])) == {"corpus"}


def test_kinds_share_the_tokens_and_the_last_window_is_cut(tmp_path: Path):
    data = [
        str(write_ids(tmp_path / "a.jsonl", [30] * 10)),
        str(write_ids(tmp_path / "b.jsonl", [200])),
    ]
    specs = pass_specs(data, tokens=200, context=80, seed=0)
    corpus = build_corpus(specs, checkpoint=tmp_path, vocab_size=256, max_bad_share=0)
    windows = windows_of(corpus)
    assert windows.kinds == ("a", "b")
    assert windows.length_W.tolist() == [30, 30, 30, 10, 80]
    assert windows.kind_W.tolist() == [0, 0, 0, 0, 1]
    assert corpus.record["warnings"] == []


def test_too_few_tokens_for_the_kinds_are_refused(tmp_path: Path):
    data = [str(write_ids(tmp_path / f"{name}.jsonl", [9])) for name in "abc"]
    with pytest.raises(DataError, match="too few for 3 kinds"):
        pass_specs(data, tokens=5, context=4, seed=0)
