"""JSONL, Parquet and datasets: seeded order, bad records by place, memory, and what is no data."""

import builtins
import hashlib
import json
import tracemalloc
from pathlib import Path

import datasets
import pytest
from pyarrow import Table, parquet

from fourge.calibrate import sources
from fourge.calibrate.sources import DatasetId, find_data, identify_data, open_sources
from fourge.errors import DataError


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def texts(count, start=0):
    return [{"text": f"t{number}"} for number in range(start, start + count)]


def write_parquet(path, rows, *, group):
    parquet.write_table(Table.from_pylist(rows), path, row_group_size=group)
    return path


def read(data, seed=0):
    """The texts of one source, in order, without the ones passed over."""
    (source,) = open_sources([str(data)], seed=seed, vocab_size=100)
    return [record.text for record in source.records if record], source


# ---- which data a string means


def test_a_folder_stands_for_its_data_files_in_sorted_order(tmp_path):
    write_lines(tmp_path / "b.jsonl", texts(1))
    write_lines(tmp_path / "notes.txt", texts(1))
    write_parquet(tmp_path / "a.parquet", texts(1), group=1)
    names = [place.name for place in find_data([str(tmp_path)])]
    assert names == ["a.parquet", "b.jsonl"]


def test_a_file_named_twice_is_read_once(tmp_path):
    path = write_lines(tmp_path / "b.jsonl", texts(1))
    assert find_data([str(tmp_path), str(path)]) == [path]


def test_dataset_ids_have_configs_splits_and_files():
    assert find_data(
        ["org/name", "org/name:test", "org/name/en", "org/name/en:test", "org/name/data/x*.jsonl"]
    ) == [
        DatasetId("org/name", "org/name", None, "train", None),
        DatasetId("org/name:test", "org/name", None, "test", None),
        DatasetId("org/name/en", "org/name", "en", "train", None),
        DatasetId("org/name/en:test", "org/name", "en", "test", None),
        DatasetId("org/name/data/x*.jsonl", "org/name", None, "train", "data/x*.jsonl"),
    ]


@pytest.mark.parametrize(
    "item", ["nothing.jsonl", "./org/name", "/no/such", "no/such.jsonl", "word", "a/b/c/d", "a b/c"]
)
def test_what_neither_exists_nor_is_an_id_is_refused(item):
    with pytest.raises(DataError, match="there is no file or folder"):
        find_data([item])


def test_a_folder_without_data_and_a_split_of_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no \.jsonl or \.parquet"):
        find_data([str(tmp_path)])
    with pytest.raises(DataError, match="files and a split"):
        find_data(["org/name/data/x.jsonl:train"])


def test_data_is_identified_by_content_and_not_by_folder(tmp_path):
    for folder in ("one", "two"):
        write_lines(tmp_path / folder / "a.jsonl", texts(3))
    first, second = (identify_data([str(tmp_path / name / "a.jsonl")]) for name in ("one", "two"))
    digest = hashlib.sha256((tmp_path / "one" / "a.jsonl").read_bytes()).hexdigest()
    assert first == second == [{"name": "a.jsonl", "bytes": 45, "sha256": digest}]
    write_lines(tmp_path / "two" / "a.jsonl", texts(3, start=1))
    assert identify_data([str(tmp_path / "two")]) != first
    assert identify_data(["org/name:test"]) == [{"dataset": "org/name:test"}]


# ---- JSONL


def test_jsonl_comes_in_an_order_that_the_seed_decides(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", texts(50))
    first, _ = read(path, seed=7)
    assert read(path, seed=7)[0] == first
    assert read(path, seed=8)[0] != first
    assert sorted(first) == sorted(record["text"] for record in texts(50))
    assert first != [record["text"] for record in texts(50)]


def test_every_line_is_checked_before_the_first_is_read(tmp_path):
    lines = [*texts(4), "", "{broken", {"prompt": "x"}, {"toxic": True, "text": "x"}, *texts(2, 4)]
    path = write_lines(tmp_path / "a.jsonl", lines)
    (source,) = open_sources([str(path)], seed=0, vocab_size=100)
    tally = source.tally
    assert (tally.records, tally.filtered) == (9, 1)
    assert dict(tally.bad) == {"not JSON": 1, "no known key": 1}
    assert [bad.where for bad in tally.examples] == ["a.jsonl:6", "a.jsonl:7"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert source.facts == {"name": "a.jsonl", "bytes": path.stat().st_size, "sha256": digest}
    records = list(source.records)
    assert sorted(record.text for record in records) == [f"t{number}" for number in range(6)]
    place = {record.text: record.where for record in records}
    assert (place["t0"], place["t5"]) == ("a.jsonl:1", "a.jsonl:10")


def test_a_last_line_without_newline_and_windows_newlines_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\r\n\r\n{"text": "b"}')
    assert sorted(read(path)[0]) == ["a", "b"]


def test_a_file_that_changes_under_the_reader_stops_the_run(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", texts(5))
    (source,) = open_sources([str(path)], seed=0, vocab_size=100)
    path.write_text("x" * path.stat().st_size)
    with pytest.raises(DataError, match="not what it was a moment ago"):
        list(source.records)


def test_a_large_file_is_never_held_in_memory(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "x" * 1000}] * 20_000)
    assert path.stat().st_size > 20e6
    tracemalloc.start()
    found, _ = sum_lengths(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == 20_000_000
    assert peak < 2e6


def sum_lengths(path):
    (source,) = open_sources([str(path)], seed=0, vocab_size=100)
    return sum(len(record.text) for record in source.records if record), source


# ---- Parquet


def test_parquet_rows_are_shuffled_within_shuffled_groups(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", texts(60), group=20)
    first, source = read(path, seed=1)
    assert read(path, seed=1)[0] == first
    assert read(path, seed=2)[0] != first
    assert sorted(first) == sorted(record["text"] for record in texts(60))
    groups = [{int(text[1:]) // 20 for text in first[start : start + 20]} for start in (0, 20, 40)]
    assert sorted(map(tuple, groups)) == [(0,), (1,), (2,)]
    assert source.facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_parquet_conversations_lose_their_null_keys_and_keep_their_place(tmp_path):
    call = {"name": "f", "arguments": '{"a": null}'}
    rows = [
        {
            "messages": [{"role": "user", "content": "Hi", "tool_calls": None}],
            "tools": '[{"a": 1}]',
        },
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": call}]}]},
        {"messages": [{"role": "robot", "content": "x"}]},
    ]
    path = write_parquet(tmp_path / "a.parquet", rows, group=2)
    (source,) = open_sources([str(path)], seed=0, vocab_size=100)
    records = {record.where: record for record in source.records if record}
    assert records["a.parquet:1"].messages == [{"role": "user", "content": "Hi"}]
    assert records["a.parquet:1"].tools == [{"a": 1}]
    assert records["a.parquet:2"].messages[0]["tool_calls"][0]["function"]["arguments"] == {
        "a": None
    }
    assert [(bad.where, bad.kind) for bad in source.tally.examples] == [
        ("a.parquet:3", "unknown role")
    ]


def test_one_row_group_is_decoded_at_a_time(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", texts(30), group=10)
    decoded = []
    real = parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        parquet.ParquetFile,
        "read_row_group",
        lambda self, group, **kwargs: decoded.append(group) or real(self, group, **kwargs),
    )
    (source,) = open_sources([str(path)], seed=0, vocab_size=100)
    assert decoded == []
    for _ in range(10):
        next(source.records)
    assert len(decoded) == 1
    assert len(list(source.records)) == 20
    assert sorted(decoded) == [0, 1, 2]


def test_columns_that_are_not_ours_are_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"prompt": "x", "id": 1}], group=1)
    with pytest.raises(DataError, match="has the columns prompt, id, needed one of messages"):
        open_sources([str(path)], seed=0, vocab_size=100)


def test_a_truncated_parquet_file_is_one_sentence(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", texts(60), group=20)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="is not whole Parquet") as caught:
        open_sources([str(path)], seed=0, vocab_size=100)
    assert "\n" not in str(caught.value)


# ---- datasets


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in the place of the hub, so that the real package streams from it."""
    monkeypatch.setattr(sources, "HUB", f"{tmp_path}/")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def test_files_of_a_dataset_are_streamed_line_by_line(hub, capfd):
    uneven = [{"text": "a", "tools": "x"}, {"text": "b \u2028 c", "tools": [1]}, "{broken", ""]
    write_lines(
        hub / "org/name/data/x-0.jsonl", [*texts(40), *map(json.dumps, uneven[:2]), *uneven[2:]]
    )
    write_lines(hub / "org/name/data/x-1.jsonl", texts(40, start=40))
    write_lines(hub / "org/name/data/other.jsonl", [{"text": "never"}])
    first, source = read("org/name/data/x*.jsonl", seed=1)
    assert sorted(first) == sorted([*(f"t{number}" for number in range(80)), "a", "b \u2028 c"])
    assert read("org/name/data/x*.jsonl", seed=1)[0] == first
    assert read("org/name/data/x*.jsonl", seed=2)[0] != first
    assert dict(source.tally.bad) == {"not JSON": 1}
    assert source.tally.records == 83
    assert source.tally.examples[0].where.startswith("org/name/data/x*.jsonl:")
    assert capfd.readouterr() == ("", "")


def test_a_dataset_streams_its_split_in_seeded_order(hub, monkeypatch):
    write_lines(hub / "org/name/train.jsonl", [*texts(40), {"text": "bad", "toxic": True}])
    write_lines(hub / "org/name/test.jsonl", texts(3, start=90))

    def opened(split, seed):
        dataset = DatasetId("org/name", str(hub / "org/name"), None, split, None)
        monkeypatch.setattr(sources, "find_data", lambda data: [dataset])
        return read("org/name", seed=seed)

    first, source = opened("train", 1)
    assert sorted(first) == sorted(f"t{number}" for number in range(40))
    assert (source.tally.records, source.tally.filtered) == (41, 1)
    assert source.facts == {"name": "org/name", "revision": None}
    assert opened("train", 1)[0] == first
    assert opened("train", 2)[0] != first
    assert sorted(opened("test", 1)[0]) == ["t90", "t91", "t92"]
    with pytest.raises(DataError, match="as a dataset id it cannot be read"):
        opened("nothing", 1)


def test_a_dataset_that_cannot_be_reached_is_one_sentence(hub, capfd):
    with pytest.raises(
        DataError, match=r"org/name/a\.jsonl is no file .* cannot be read"
    ) as caught:
        open_sources(["org/name/a.jsonl"], seed=0, vocab_size=100)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("package", "item"), [("pyarrow", "a.parquet"), ("datasets", "org/name")])
def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch, package, item):
    write_parquet(tmp_path / "a.parquet", texts(1), group=1)
    monkeypatch.chdir(tmp_path)
    real = builtins.__import__

    def without(name, *rest, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install fourge\[datasets\]"):
        open_sources([item], seed=0, vocab_size=100)


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", texts(1))

    def refuse(self, *rest, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl: Permission denied"):
        open_sources([str(path)], seed=0, vocab_size=100)
