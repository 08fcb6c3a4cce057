"""build_corpus: lengths, order, reproducibility, what is counted, and what stops a run."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fourge.calibrate.corpus import RECORD_FILE, TOKENS_FILE, Corpus, PassSpec, build_corpus
from fourge.errors import CheckpointError, DataError

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY_GLM = EXAMPLES / "tiny-glm"


def write_lines(path, records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def ids(*lengths, start=0):
    """Records of input_ids; the first token of each is its number."""
    return [
        {"input_ids": [number, *[99] * (length - 1)]}
        for number, length in enumerate(lengths, start)
    ]


def spec(*data, name="p", samples=100, min_tokens=1, max_tokens=100, seed=0):
    return PassSpec(name, data, samples, min_tokens, max_tokens, seed)


def build(*specs, checkpoint=TINY_GLM, vocab_size=2048, max_bad_share=0.1, on_progress=None):
    return build_corpus(
        specs,
        checkpoint=checkpoint,
        vocab_size=vocab_size,
        max_bad_share=max_bad_share,
        on_progress=on_progress,
    )


def sequences(corpus):
    return np.split(corpus.tokens, np.cumsum(corpus.lengths)[:-1])


def first_tokens(corpus):
    return [int(sequence[0]) for sequence in sequences(corpus)]


def test_sequences_lie_end_to_end_in_the_order_of_the_passes(tmp_path):
    one = write_lines(tmp_path / "one.jsonl", ids(3, 4, 5))
    two = write_lines(tmp_path / "two.jsonl", ids(6, 7, start=50))
    corpus = build(spec(one, name="one"), spec(two, name="two"), checkpoint=tmp_path)
    assert corpus.passes == ("one", "two")
    assert (corpus.tokens.dtype, corpus.lengths.dtype) == (np.int32, np.int64)
    assert corpus.pass_of.dtype == np.uint8
    assert corpus.pass_of.tolist() == [0, 0, 0, 1, 1]
    assert sorted(corpus.lengths[:3]) == [3, 4, 5]
    assert corpus.lengths.sum() == len(corpus.tokens) == 25
    assert {int(sequence[0]): len(sequence) for sequence in sequences(corpus)} == {
        0: 3, 1: 4, 2: 5, 50: 6, 51: 7,
    }  # fmt: skip


def test_token_ids_need_no_tokenizer_and_text_does(tmp_path):
    assert (
        len(build(spec(write_lines(tmp_path / "a.jsonl", ids(3))), checkpoint=tmp_path).tokens) == 3
    )
    text = write_lines(tmp_path / "b.jsonl", [{"text": "Hi"}])
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        build(spec(text), checkpoint=tmp_path)


def test_long_sequences_are_cut_and_short_ones_passed_over(tmp_path):
    data = write_lines(tmp_path / "a.jsonl", ids(2, 5, 8, 20))
    corpus = build(spec(data, min_tokens=5, max_tokens=8))
    assert sorted(zip(first_tokens(corpus), corpus.lengths.tolist(), strict=True)) == [
        (1, 5), (2, 8), (3, 8),
    ]  # fmt: skip
    assert corpus.record["passes"][0]["too_short"] == 1


def test_sampling_stops_at_the_number_asked_for_and_the_seed_decides_which(tmp_path):
    data = write_lines(tmp_path / "a.jsonl", ids(*[2] * 40))
    first = build(spec(data, samples=10, seed=1))
    assert len(first.lengths) == 10
    assert first.record["warnings"] == []
    assert first_tokens(build(spec(data, samples=10, seed=1))) == first_tokens(first)
    assert first_tokens(build(spec(data, samples=10, seed=2))) != first_tokens(first)
    assert first_tokens(first) != sorted(first_tokens(first))


def test_sources_take_turns_until_each_ends(tmp_path):
    few = write_lines(tmp_path / "few.jsonl", ids(2, 2))
    many = write_lines(tmp_path / "many.jsonl", ids(*[2] * 20, start=50))
    drawn = first_tokens(build(spec(few, many, samples=10)))
    assert sum(token < 50 for token in drawn[:4]) == 2
    assert all(token >= 50 for token in drawn[4:])


def test_conversations_go_through_the_chat_template_and_text_does_not(tmp_path):
    conversation = {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        ]
    }
    from fourge.chat.tokens import load_tokenizer

    tokenizer = load_tokenizer(TINY_GLM)
    corpus = build(spec(write_lines(tmp_path / "a.jsonl", [conversation])))
    assert tokenizer.decode(corpus.tokens) == (
        "[gMASK]<sop><|user|>Hi<|assistant|></think><tool_call>f</tool_call>"
    )
    plain = build(spec(write_lines(tmp_path / "b.jsonl", [{"text": "Hi there"}])))
    assert tokenizer.decode(plain.tokens) == "Hi there"


def test_a_missing_chat_template_matters_to_conversations_alone(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TINY_GLM, model, ignore=shutil.ignore_patterns("*.jinja", "*.safetensors"))
    text = write_lines(tmp_path / "a.jsonl", [{"text": "Hi"}])
    assert len(build(spec(text), checkpoint=model).lengths) == 1
    talk = write_lines(tmp_path / "b.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}])
    with pytest.raises(CheckpointError, match="no chat template"):
        build(spec(talk), checkpoint=model)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    data = write_lines(tmp_path / "a.jsonl", [{"text": "<|user|>"}])
    with pytest.raises(
        CheckpointError, match="gives token 2034, the model's vocabulary is 0 to 2033"
    ):
        build(spec(data), vocab_size=2034)


def test_bad_records_are_recorded_with_kind_and_place(tmp_path):
    bad = ["{broken", {"input_ids": [5000]}, {"toxic": True, "text": "x"}]
    path = tmp_path / "a.jsonl"
    corpus = build(spec(write_lines(path, [*bad, *ids(*[2] * 27)])))
    assert corpus.record["passes"][0] == {
        "name": "p",
        "asked": 100,
        "sequences": 27,
        "tokens": 54,
        "min_tokens": 1,
        "max_tokens": 100,
        "seed": 0,
        "records": 30,
        "too_short": 0,
        "filtered": 1,
        "bad": {
            "records": 2,
            "kinds": {"bad input_ids": 1, "not JSON": 1},
            "examples": [
                {
                    "where": "a.jsonl:1",
                    "kind": "not JSON",
                    "reason": "the line is not JSON (Expecting property name enclosed in double"
                    " quotes: line 1 column 2 (char 1))",
                },
                {
                    "where": "a.jsonl:2",
                    "kind": "bad input_ids",
                    "reason": "its input_ids hold 5000, the vocabulary is 0 to 2047",
                },
            ],
        },
        "sources": [
            {
                "name": "a.jsonl",
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "records": 30,
            }
        ],
    }
    left_out, short = corpus.record["warnings"]
    assert left_out == (
        "pass p left out 2 of 30 records that cannot be used: a.jsonl:1: the line is not JSON"
        " (Expecting property name enclosed in double quotes: line 1 column 2 (char 1));"
        " a.jsonl:2: its input_ids hold 5000, the vocabulary is 0 to 2047"
    )
    assert short.startswith("pass p found 27 of the 100 samples asked for in 30 records of a.jsonl")
    assert json.loads(json.dumps(corpus.record)) == corpus.record


def test_the_share_of_bad_records_decides_whether_the_run_stops(tmp_path):
    roles = [{"messages": [{"role": "robot", "content": "x"}]}] * 2
    data = write_lines(tmp_path / "a.jsonl", [*roles, *ids(*[2] * 18)])
    assert len(build(spec(data), max_bad_share=0.1).lengths) == 18
    with pytest.raises(DataError) as caught:
        build(spec(data, name="coding"), max_bad_share=0.09)
    assert str(caught.value) == (
        "2 of 20 records (10.0%) of pass coding cannot be used, more than 9%: a.jsonl:1: message 1"
        ' has role "robot", known are system, developer, user, assistant, tool, function;'
        ' a.jsonl:2: message 1 has role "robot", known are system, developer, user, assistant,'
        " tool, function. Mend or remove them, or raise max_bad_share in the recipe."
    )


def test_conversations_that_the_template_refuses_count_as_bad(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TINY_GLM, model, ignore=shutil.ignore_patterns("*.safetensors"))
    (model / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    talk = {"messages": [{"role": "user", "content": "Hi"}]}
    data = write_lines(tmp_path / "a.jsonl", [talk, *ids(*[2] * 19)])
    bad = build(spec(data), checkpoint=model).record["passes"][0]["bad"]
    assert bad["kinds"] == {"refused by the template": 1}
    assert bad["examples"][0]["where"] == "a.jsonl:1"


def test_a_stream_of_bad_records_stops_before_its_end(tmp_path, monkeypatch):
    from fourge.calibrate import corpus as module
    from fourge.calibrate.records import Tally, count_record
    from fourge.calibrate.sources import Source

    tally = Tally()
    endless = (count_record(lambda: {"prompt": "x"}, "d:1", tally, 100) for _ in iter(int, 1))
    source = Source("d", {"name": "d"}, tally, endless)
    monkeypatch.setattr(module, "open_sources", lambda *args, **kwargs: [source])
    with pytest.raises(DataError, match=r"1,000 of 1,000 records \(100\.0%\)"):
        build(spec("d"))


def test_a_pass_that_finds_nothing_says_why(tmp_path):
    data = write_lines(tmp_path / "a.jsonl", [*ids(2, 3), {"toxic": True}])
    with pytest.raises(DataError) as caught:
        build(spec(data, name="deep", min_tokens=50))
    assert str(caught.value) == (
        "pass deep found no sample in 3 records of a.jsonl (2 shorter than 50 tokens, 1 marked"
        " toxic). Give it other data (--data deep=PATH), or lower min_tokens in the recipe."
    )


def test_an_empty_file_finds_nothing(tmp_path):
    with pytest.raises(DataError, match=r"found no sample in 0 records of a\.jsonl"):
        build(spec(write_lines(tmp_path / "a.jsonl", [])))


def test_progress_is_told_now_and_then_and_at_the_end(tmp_path):
    told = []
    data = write_lines(tmp_path / "a.jsonl", ids(*[2] * 99))
    build(spec(data, samples=200), on_progress=lambda *news: told.append(news))
    assert told == [("p", 64, 200), ("p", 99, 200)]


def test_the_hash_depends_on_tokens_and_not_on_folders(tmp_path):
    corpora = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        corpora.append(build(spec(write_lines(tmp_path / folder / "a.jsonl", ids(3, 4)))))
    assert corpora[0].record == corpora[1].record
    other = build(spec(write_lines(tmp_path / "a.jsonl", ids(3, 5))))
    assert other.record["sha256"] != corpora[0].record["sha256"]


def test_what_is_saved_is_what_is_loaded(tmp_path):
    corpus = build(spec(write_lines(tmp_path / "a.jsonl", ids(3, 4, 5))))
    corpus.save(tmp_path)
    loaded = Corpus.load(tmp_path)
    assert loaded.passes == corpus.passes
    assert loaded.record == corpus.record
    for name in ("tokens", "lengths", "pass_of"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(corpus, name))
        assert getattr(loaded, name).dtype == getattr(corpus, name).dtype
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", RECORD_FILE, TOKENS_FILE]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / RECORD_FILE).unlink(),
        lambda folder: (folder / RECORD_FILE).write_text("{}"),
        lambda folder: (folder / TOKENS_FILE).write_bytes(b""),
        lambda folder: (folder / TOKENS_FILE).write_bytes(
            (folder / TOKENS_FILE).read_bytes()[:200]
        ),
        lambda folder: np.savez(
            folder / TOKENS_FILE,
            tokens=np.zeros(12, np.int32),
            lengths=np.array([3, 4, 5]),
            pass_of=np.zeros(3, np.uint8),
        ),
    ],
)
def test_damaged_files_are_not_loaded(tmp_path, damage):
    build(spec(write_lines(tmp_path / "a.jsonl", ids(3, 4, 5)))).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match="remove the two files and run the same command again"):
        Corpus.load(tmp_path)


def test_the_bundled_conversations_are_all_usable():
    counts = {}
    for name in ("coding", "broad", "deep"):
        data = str(EXAMPLES / "conversations" / f"{name}.jsonl")
        least = 8192 if name == "deep" else 200
        done = build(spec(data, name=name, samples=1000, min_tokens=least, max_tokens=8192))
        entry = done.record["passes"][0]
        assert (entry["bad"]["records"], entry["too_short"]) == (0, 0)
        counts[name] = entry["sequences"]
    assert counts == {"coding": 70, "broad": 54, "deep": 11}


def test_token_ids_are_read_without_torch_or_transformers(tmp_path):
    data = write_lines(tmp_path / "a.jsonl", ids(3))
    script = (
        "import sys; from pathlib import Path\n"
        "from fourge.calibrate.corpus import PassSpec, build_corpus\n"
        f"one = PassSpec('p', ({data!r},), 1, 1, 9, 0)\n"
        "build_corpus([one], checkpoint=Path(), vocab_size=100, max_bad_share=0)\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_an_open_ended_pass_takes_what_there_is_without_a_warning(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ids(*[2] * 7))
    seen = []
    one = replace(spec(path), open_ended=True)
    corpus = build(one, on_progress=lambda *told: seen.append(told))
    assert corpus.record["warnings"] == []
    assert seen[-1] == ("p", 7, 0)
