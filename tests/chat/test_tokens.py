"""load_tokenizer: what it finds, what it refuses, and that it keeps quiet."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fourge.chat.tokens import Detokenizer, encode, load_tokenizer, tag_ids
from fourge.errors import CheckpointError

TINY_GLM = Path(__file__).parents[2] / "examples" / "tiny-glm"


def test_the_tags_of_the_protocol_are_single_tokens(tokenizer):
    text = "[gMASK]<sop><|user|><think></think><tool_call><arg_key><arg_value>"
    assert encode(tokenizer, text, rendered=True) == [
        2029, 2031, 2034, 2037, 2038, 2039, 2043, 2045,
    ]  # fmt: skip


def test_a_folder_without_vocabulary_is_refused_by_the_files_looked_for(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"none of tokenizer\.json, tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_a_truncated_tokenizer_is_one_sentence(tmp_path):
    shutil.copytree(TINY_GLM, tmp_path, dirs_exist_ok=True)
    whole = (TINY_GLM / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(whole[:5000], encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_of_the_checkpoint_is_never_run(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((TINY_GLM / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}})
    )
    trace = tmp_path / "ran"
    (tmp_path / "own.py").write_text(
        f"open({str(trace)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast\n"
        "class OwnTokenizer(PreTrainedTokenizerFast): pass\n"
    )
    with contextlib.suppress(CheckpointError):
        load_tokenizer(tmp_path)
    assert not trace.exists()


def test_a_text_longer_than_the_model_allows_prints_nothing(tmp_path):
    script = (
        "from pathlib import Path\n"
        "from fourge.chat.tokens import encode, load_tokenizer\n"
        f"tokenizer = load_tokenizer(Path({str(TINY_GLM)!r}))\n"
        "assert len(encode(tokenizer, 'word ' * 9000, rendered=False)) > 9000\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_plain_text_gets_the_beginning_that_the_tokenizer_adds(tmp_path):
    shutil.copytree(TINY_GLM, tmp_path, dirs_exist_ok=True)
    raw = json.loads((TINY_GLM / "tokenizer.json").read_text(encoding="utf-8"))
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<sop>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<sop>": {"id": "<sop>", "ids": [2031], "tokens": ["<sop>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    plain = encode(tokenizer, "Hi", rendered=False)
    assert plain[0] == 2031
    assert encode(tokenizer, "Hi", rendered=True) == plain[1:]


def test_the_tags_of_a_vocabulary_by_their_ids(tokenizer):
    found = tag_ids(tokenizer)
    assert found[2037] == "<think>"
    assert found[2046] == "</arg_value>"
    assert found[2034] == "<|user|>"
    assert len(found) == 11


def test_a_character_of_several_tokens_comes_whole(tokenizer):
    ids = encode(tokenizer, "a\u6f22\U0001f642</think> b", rendered=True)
    detokenizer = Detokenizer(tokenizer)
    texts = [detokenizer.feed(token) for token in ids]
    assert texts == ["a", "", "", "\u6f22", "", "", "", "\U0001f642", "</think>", " b"]
    assert detokenizer.finish() == ""


def test_half_a_character_is_shown_at_the_end_or_before_a_special_token(tokenizer):
    half = encode(tokenizer, "\U0001f642", rendered=True)[0]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.feed(half) == ""
    assert detokenizer.feed(2038) == "\ufffd</think>"
    assert detokenizer.feed(half) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


def test_broken_bytes_without_end_are_shown_and_forgotten(tokenizer):
    half = encode(tokenizer, "\U0001f642", rendered=True)[1]
    detokenizer = Detokenizer(tokenizer)
    texts = [detokenizer.feed(half) for _ in range(20)]
    assert texts == [*[""] * 7, "\ufffd" * 8, *[""] * 7, "\ufffd" * 8, *[""] * 4]
    assert detokenizer.finish() == "\ufffd" * 4
