"""Where calibration records lie: JSONL and Parquet files and Hugging Face datasets.

Each is read in seeded order. Held in memory: of a JSONL file two integers a line, of Parquet one
row group, of a dataset its shuffle buffer. Every line of a JSONL file is checked when it is opened;
rows of the other two are checked as they are read. pyarrow and datasets are optional packages.
"""

import hashlib
import re
from array import array
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fourge.calibrate.records import (
    CONTENT_KEYS,
    KNOWN_KEYS,
    Record,
    Tally,
    count_record,
    parse_line,
    parse_record,
    without_nulls,
)
from fourge.chat.template import MessageError
from fourge.chat.tokens import first_line, quiet
from fourge.errors import DataError

FOLDER_SUFFIXES = (".jsonl", ".parquet")
# Rows of a dataset that stream through memory while they are shuffled.
SHUFFLE_ROWS = 10_000
HUB = "hf://datasets/"
DATASET_LOGGERS = ("datasets", "huggingface_hub")
DATASET_ID = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<rest>[\w.*/-]+))?(?::(?P<split>[\w.-]+))?"
)
INSTALL = "run `pip install fourge[datasets]`, or give the data as .jsonl"


@dataclass(frozen=True)
class Source:
    """One file or dataset, opened: its records in seeded order, and what is known of it.

    ``records`` gives None for a record that is counted and passed over, so that who reads can stop.
    The tally of a JSONL file is complete when the source is opened, the others' grow as they are
    read.
    """

    name: str
    facts: dict[str, Any]
    tally: Tally
    records: Generator[Record | None]


class DatasetId(NamedTuple):
    """``org/name[/config][:split]``, or ``org/name/FILES.jsonl`` (may hold *) read line by line."""

    text: str
    repo: str
    config: str | None
    split: str
    files: str | None


def open_sources(data: Sequence[str], *, seed: int, vocab_size: int) -> list[Source]:
    """Open every file and dataset that ``data`` names; each gets an order of its own from seed.

    A folder stands for its *.jsonl and *.parquet files. Raises DataError for what does not exist
    or cannot be opened.
    """
    sources = []
    for index, place in enumerate(find_data(data)):
        order = np.random.default_rng([seed, index])
        if isinstance(place, DatasetId):
            sources.append(_open_dataset(place, order, vocab_size))
        elif _is_parquet(place):
            sources.append(_open_parquet(place, order, vocab_size))
        else:
            sources.append(_open_jsonl(place, order, vocab_size))
    return sources


def identify_data(data: Sequence[str]) -> list[dict[str, Any]]:
    """Name, size and sha256 of every file, the id of every dataset: equal data, equal answer."""
    return [
        {"dataset": place.text} if isinstance(place, DatasetId) else _file_facts(place)
        for place in find_data(data)
    ]


def find_data(data: Sequence[str]) -> list[Path | DatasetId]:
    """What each string means: a file, the files of a folder, or a dataset id; each named once."""
    found: dict[Path | DatasetId, Path | DatasetId] = {}
    for item in data:
        path = Path(item).expanduser()
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix in FOLDER_SUFFIXES)
            if not files:
                raise DataError(
                    f"the folder {path} holds no {' or '.join(FOLDER_SUFFIXES)} file: give a file,"
                    " or a folder that has some."
                )
            found |= {file.resolve(): file for file in files}
        elif path.is_file():
            found[path.resolve()] = path
        else:
            dataset = _parse_dataset_id(item)
            found[dataset] = dataset
    return list(found.values())


def _parse_dataset_id(item: str) -> DatasetId:
    match = DATASET_ID.fullmatch(item)
    rest = match["rest"] if match else None
    files = rest if rest and rest.endswith(".jsonl") else None
    looks_like_path = item.startswith((".", "/", "~")) or (
        rest is None and item.endswith((".json", *FOLDER_SUFFIXES))
    )
    if match is None or looks_like_path or (files is None and "/" in (rest or "")):
        raise DataError(
            f"there is no file or folder {item}: give one that exists, or a dataset id in the form"
            " org/name[/config][:split] or org/name/FILES.jsonl."
        )
    if files and match["split"]:
        raise DataError(f"{item} names files and a split: files have none, leave it out.")
    config = rest if files is None else None
    return DatasetId(item, match["repo"], config, match["split"] or "train", files)


# ---- JSONL


def _open_jsonl(path: Path, order: np.random.Generator, vocab_size: int) -> Source:
    """Hash the file and check every line of it; only the places of the usable ones are kept."""
    tally, digest = Tally(), hashlib.sha256()
    starts, numbers = array("q"), array("q")
    start = 0
    with _reading(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            digest.update(line)
            if line.strip():
                where = f"{path.name}:{number}"
                if count_record(lambda line=line: parse_line(line), where, tally, vocab_size):
                    starts.append(start)
                    numbers.append(number)
            start += len(line)
    facts = {"name": path.name, "bytes": start, "sha256": digest.hexdigest()}
    return Source(path.name, facts, tally, _jsonl_records(path, starts, numbers, order, vocab_size))


def _jsonl_records(
    path: Path, starts: array, numbers: array, order: np.random.Generator, vocab_size: int
) -> Generator[Record]:
    with _reading(path), path.open("rb") as file:
        for index in order.permutation(len(starts)):
            file.seek(starts[index])
            where = f"{path.name}:{numbers[index]}"
            try:
                record = parse_record(parse_line(file.readline()), where, vocab_size)
            except MessageError as error:
                raise DataError(
                    f"{where} is not what it was a moment ago ({error}): leave {path} alone while"
                    " it is read, and run the same command again."
                ) from error
            assert record is not None
            yield record


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}. Give a file that can be read."
        ) from error


def _file_facts(path: Path) -> dict[str, Any]:
    with _reading(path), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"name": path.name, "bytes": file.tell(), "sha256": digest}


# ---- Parquet


def _is_parquet(path: Path) -> bool:
    with _reading(path), path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _open_parquet(path: Path, order: np.random.Generator, vocab_size: int) -> Source:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: {INSTALL}.") from error
    with _reading(path), _arrow_errors(path):
        file = ParquetFile(path)
        columns = [name for name in file.schema_arrow.names if name in KNOWN_KEYS]
    if not set(columns) & set(CONTENT_KEYS):
        raise DataError(
            f"{path} has the columns {', '.join(file.schema_arrow.names[:8])}, needed one of"
            f" {', '.join(CONTENT_KEYS)}: rename a column, or give other data."
        )
    tally = Tally()
    records = _parquet_records(file, path, columns, order, tally, vocab_size)
    return Source(path.name, _file_facts(path), tally, records)


def _parquet_records(
    file: Any, path: Path, columns: list[str], order: np.random.Generator, tally: Tally, vocab: int
) -> Generator[Record | None]:
    """Row groups in seeded order, the rows of each shuffled."""
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    first_rows = np.cumsum([1, *sizes])
    with file:
        for group in order.permutation(file.num_row_groups):
            with _reading(path), _arrow_errors(path):
                table = file.read_row_group(int(group), columns=columns)
            for index in order.permutation(table.num_rows):
                row = {name: table.column(name)[int(index)].as_py() for name in columns}
                where = f"{path.name}:{first_rows[group] + index}"
                yield count_record(lambda row=row: without_nulls(row), where, tally, vocab)


@contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except ArrowException as error:
        raise DataError(
            f"{path} is not whole Parquet ({first_line(error)}): fetch or write it again."
        ) from error


# ---- Hugging Face datasets


def _open_dataset(dataset: DatasetId, order: np.random.Generator, vocab_size: int) -> Source:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{dataset.text} is no file or folder here; as a dataset id it needs the package"
            f" datasets: {INSTALL}."
        ) from error
    seed = int(order.integers(2**31))
    with quiet(*DATASET_LOGGERS), _without_bars(), _dataset_errors(dataset):
        if dataset.files is None:
            builder = datasets.load_dataset_builder(dataset.repo, dataset.config)
        else:
            # As text: one malformed line or an uneven schema must not end the whole stream.
            files = {dataset.split: f"{HUB}{dataset.repo}/{dataset.files}"}
            builder = datasets.load_dataset_builder(
                "text", data_files=files, encoding_errors="replace"
            )
        stream = builder.as_streaming_dataset(split=dataset.split)
        assert isinstance(stream, datasets.IterableDataset)
        rows = iter(stream.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS))
    facts = {"name": dataset.text, "revision": _revision(builder, dataset.split)}
    tally = Tally()
    return Source(dataset.text, facts, tally, _dataset_records(dataset, rows, tally, vocab_size))


def _dataset_records(
    dataset: DatasetId, rows: Iterator[dict[str, Any]], tally: Tally, vocab_size: int
) -> Generator[Record | None]:
    """Records placed by their number in the shuffled stream, which seed and revision determine."""
    number = 0
    while True:
        with quiet(*DATASET_LOGGERS), _dataset_errors(dataset):
            row = next(rows, None)
        if row is None:
            return
        number += 1
        where = f"{dataset.text}:{number}"
        if dataset.files is None:
            yield count_record(lambda row=row: without_nulls(row), where, tally, vocab_size)
        elif row["text"].strip():
            yield count_record(lambda row=row: parse_line(row["text"]), where, tally, vocab_size)


def _revision(builder: Any, split: str) -> str | None:
    """The commit of the hub's repository, as far as the package tells it."""
    files = (builder.config.data_files or {}).get(split)
    origins = {origin for origin in getattr(files, "origin_metadata", []) if len(origin) == 2}
    return ", ".join(sorted(revision for _, revision in origins)) or None


@contextmanager
def _dataset_errors(dataset: DatasetId) -> Iterator[None]:
    # The package raises errors of a dozen libraries: network, gating, file formats, schemas.
    try:
        yield
    except Exception as error:
        raise DataError(
            f"{dataset.text} is no file or folder here, and as a dataset id it cannot be read"
            f" ({first_line(error)}): check the name and your access to it, or name its JSONL files"
            " (org/name/FILES.jsonl), or give a path."
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hold back the progress bars of datasets and huggingface_hub: the terminal has ours."""
    import datasets.utils as of_datasets
    import huggingface_hub.utils as of_hub

    shown = [m for m in (of_datasets, of_hub) if not m.are_progress_bars_disabled()]
    for module in shown:
        module.disable_progress_bars()
    try:
        yield
    finally:
        for module in shown:
            module.enable_progress_bars()
