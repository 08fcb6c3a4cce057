"""Passes -> token sequences: choose records, render, tokenize, cut and filter by length.

The sources of a pass are drawn from in turn, each in its own seeded order, until the pass has its
samples or the sources end. The same data, seeds and tokenizer give the same tokens; what was read,
counted and left out is in ``Corpus.record``. Held in memory: the tokens, four bytes each. Knows
nothing of models; imports no torch, and transformers only when a record needs the tokenizer.
"""

import hashlib
import io
import json
import math
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from fourge.calibrate.records import MAX_EXAMPLES, Record, Tally
from fourge.calibrate.sources import Source, open_sources
from fourge.chat.template import MessageError, render
from fourge.chat.tokens import encode, load_tokenizer
from fourge.checkpoint.writer import write_file, write_json
from fourge.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

MAX_PASSES = 256  # pass_of is uint8
TOKENS_FILE = "corpus.npz"
RECORD_FILE = "corpus.json"
# Records between two looks at the share of bad ones, and between two reports of progress.
LOOK_EVERY = 1000
REPORT_EVERY = 64
MESSAGE_EXAMPLES = 3

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class PassSpec:
    """What one pass asks for: data (paths, dataset ids), how many samples, of which length.

    ``open_ended``: the recipe names no number, so fewer than ``samples`` are no shortage.
    ``most_tokens``: the pass ends with the sample that reaches it, which is cut there.
    ``from_recipe``: its limits can be changed there, so messages may say so.
    """

    name: str
    data: tuple[str, ...]
    samples: int
    min_tokens: int
    max_tokens: int
    seed: int
    open_ended: bool = False
    most_tokens: int | None = None
    from_recipe: bool = True


@dataclass(frozen=True)
class Corpus:
    """Token sequences laid end to end, in the order of the passes, and how they came to be.

    tokens: int32 [N]. lengths: int64 [S], sums to N. pass_of: uint8 [S], index into passes, never
    falling. record: JSON-able; per pass what was asked, found and left out, and from which files.
    """

    passes: tuple[str, ...]
    tokens: np.ndarray
    lengths: np.ndarray
    pass_of: np.ndarray
    record: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write two files; the second, which makes them valid, only when the first is whole."""
        buffer = io.BytesIO()
        np.savez(buffer, tokens=self.tokens, lengths=self.lengths, pass_of=self.pass_of)
        write_file(folder / TOKENS_FILE, buffer.getvalue())
        write_json(folder / RECORD_FILE, self.record)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What ``save`` wrote; DataError if the files are missing or changed."""
        try:
            record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
            # Opened here, since np.load leaves a file open that it cannot read.
            with (folder / TOKENS_FILE).open("rb") as file:
                arrays = np.load(file, allow_pickle=False)
                tokens, lengths, pass_of = (arrays[key] for key in ("tokens", "lengths", "pass_of"))
            whole = record["sha256"] == _digest(tokens, lengths, pass_of)
            passes = tuple(entry["name"] for entry in record["passes"])
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise DataError(_damaged(folder)) from error
        if not whole:
            raise DataError(_damaged(folder))
        return cls(passes, tokens, lengths, pass_of, record)


@dataclass(frozen=True)
class _Filled:
    """One pass when its sources have been drawn from."""

    spec: PassSpec
    sources: list[Source]
    sequences: list[np.ndarray]
    too_short: int


def build_corpus(
    specs: Sequence[PassSpec],
    *,
    checkpoint: Path,
    vocab_size: int,
    max_bad_share: float,
    on_progress: Progress | None = None,
) -> Corpus:
    """Fill every pass; ``on_progress`` is called now and then with (pass, accepted, asked), where
    asked is 0 for an open-ended pass.

    A pass that finds fewer samples than asked is noted in ``record["warnings"]``. Raises DataError
    if data cannot be read, if a pass finds nothing, or if more than ``max_bad_share`` (0 to 1) of
    its records are bad; CheckpointError if the tokenizer or chat template is needed and unusable.
    """
    assert 0 < len(specs) <= MAX_PASSES
    encoder = _Encoder(checkpoint, vocab_size)
    passes = []
    for spec in specs:
        sources = open_sources(spec.data, seed=spec.seed, vocab_size=vocab_size)
        with ExitStack() as stack:
            for source in sources:
                stack.enter_context(closing(source.records))
            filled = _fill(spec, sources, encoder, max_bad_share, on_progress)
        if not filled.sequences:
            raise DataError(_nothing_found(filled))
        passes.append(filled)
    sequences = [sequence for filled in passes for sequence in filled.sequences]
    tokens = np.concatenate(sequences)
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    counts = [len(filled.sequences) for filled in passes]
    pass_of = np.repeat(np.arange(len(passes), dtype=np.uint8), counts)
    record = {
        "sha256": _digest(tokens, lengths, pass_of),
        "sequences": len(lengths),
        "tokens": len(tokens),
        "passes": [_describe(filled) for filled in passes],
        "warnings": [warning for filled in passes for warning in _warnings(filled)],
    }
    return Corpus(tuple(spec.name for spec in specs), tokens, lengths, pass_of, record)


def _fill(
    spec: PassSpec,
    sources: list[Source],
    encoder: "_Encoder",
    max_bad_share: float,
    on_progress: Progress | None,
) -> _Filled:
    """Draw records until the pass has its samples or the sources end."""
    sequences, too_short = [], 0
    room = math.inf if spec.most_tokens is None else spec.most_tokens
    _check_bad_share(spec, sources, max_bad_share)
    for drawn, (source, record) in enumerate(_in_turn(sources, spec.seed), start=1):
        try:
            tokens = encoder.encode(record, spec.max_tokens) if record else None
        except MessageError as error:
            assert record is not None
            source.tally.reject(record.where, error.kind, str(error))
            tokens = None
        if tokens is not None and len(tokens) >= spec.min_tokens:
            sequences.append(tokens if len(tokens) <= room else tokens[: int(room)])
            room -= len(tokens)
        elif tokens is not None:
            too_short += 1
        if drawn % LOOK_EVERY == 0:
            _check_bad_share(spec, sources, max_bad_share)
        if on_progress and drawn % REPORT_EVERY == 0:
            on_progress(spec.name, len(sequences), 0 if spec.open_ended else spec.samples)
        if len(sequences) == spec.samples or room < spec.min_tokens:
            break
    _check_bad_share(spec, sources, max_bad_share)
    if on_progress:
        on_progress(spec.name, len(sequences), 0 if spec.open_ended else spec.samples)
    return _Filled(spec, sources, sequences, too_short)


def _in_turn(sources: Sequence[Source], seed: int) -> Iterator[tuple[Source, Record | None]]:
    """One usable record of each source, round by round; None for every unusable one between."""
    order = np.random.default_rng(seed).permutation(len(sources))
    waiting = deque(sources[index] for index in order)
    while waiting:
        source = waiting.popleft()
        for record in source.records:
            yield source, record
            if record is not None:
                waiting.append(source)
                break


class _Encoder:
    """Records -> token ids; the tokenizer is loaded when the first record needs it."""

    def __init__(self, checkpoint: Path, vocab_size: int) -> None:
        self._checkpoint, self._vocab_size = checkpoint, vocab_size

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        return load_tokenizer(self._checkpoint)

    def encode(self, record: Record, max_tokens: int) -> np.ndarray:
        """The first ``max_tokens`` token ids of a record, int32 [L]."""
        if record.input_ids is not None:
            return np.array(record.input_ids[:max_tokens], dtype=np.int32)
        if record.messages is not None:
            text, rendered = render(self._tokenizer, record.messages, record.tools), True
        else:
            assert record.text is not None
            text, rendered = record.text, False
        ids = np.array(encode(self._tokenizer, text, rendered=rendered), dtype=np.int32)
        if len(ids) and ids.max() >= self._vocab_size:
            raise CheckpointError(
                f"the tokenizer in {self._checkpoint} gives token {ids.max()}, the model's"
                f" vocabulary is 0 to {self._vocab_size - 1}: the two belong to different models;"
                " put the model's own tokenizer files there."
            )
        return ids[:max_tokens]


# ---- what is said of a pass


def _total(sources: Sequence[Source]) -> Tally:
    tallies = [source.tally for source in sources]
    return Tally(
        records=sum(tally.records for tally in tallies),
        filtered=sum(tally.filtered for tally in tallies),
        bad=sum((tally.bad for tally in tallies), Counter()),
        examples=[example for tally in tallies for example in tally.examples][:MAX_EXAMPLES],
    )


def _check_bad_share(spec: PassSpec, sources: Sequence[Source], max_bad_share: float) -> None:
    total = _total(sources)
    bad = total.bad.total()
    if bad <= max_bad_share * total.records:
        return
    remedy = ", or raise max_bad_share in the recipe" if spec.from_recipe else ""
    raise DataError(
        f"{bad:,} of {total.records:,} records ({bad / total.records:.1%}) of pass {spec.name}"
        f" cannot be used, more than {max_bad_share:.0%}: {_examples(total)}. Mend or remove them"
        f"{remedy}."
    )


def _nothing_found(filled: _Filled) -> str:
    name = filled.spec.name
    remedy = ", or lower min_tokens in the recipe" if filled.spec.from_recipe else ""
    return (
        f"pass {name} found no sample in {_records_and_losses(filled)}. Give it other data (--data"
        f" {name}=PATH){remedy}."
    )


def _shortage(filled: _Filled) -> str:
    spec = filled.spec
    return (
        f"pass {spec.name} found {len(filled.sequences):,} of the {spec.samples:,} samples asked"
        f" for in {_records_and_losses(filled)}."
    )


def _records_and_losses(filled: _Filled) -> str:
    """How many records of which sources there were, and how many of them were left out, and why."""
    total = _total(filled.sources)
    losses = [
        (filled.too_short, f"shorter than {filled.spec.min_tokens:,} tokens"),
        (total.filtered, "marked toxic"),
        (total.bad.total(), f"unusable: {_examples(total)}"),
    ]
    names = ", ".join(source.name for source in filled.sources)
    text = f"{total.records:,} records of {names}"
    said = ", ".join(f"{count:,} {loss}" for count, loss in losses if count)
    return f"{text} ({said})" if said else text


def _examples(total: Tally) -> str:
    shown = [f"{bad.where}: {bad.reason}" for bad in total.examples[:MESSAGE_EXAMPLES]]
    return "; ".join(shown + ["..."] * (total.bad.total() > MESSAGE_EXAMPLES))


def _warnings(filled: _Filled) -> Iterator[str]:
    total = _total(filled.sources)
    if total.bad:
        yield (
            f"pass {filled.spec.name} left out {total.bad.total():,} of {total.records:,} records"
            f" that cannot be used: {_examples(total)}"
        )
    if not filled.spec.open_ended and len(filled.sequences) < filled.spec.samples:
        yield _shortage(filled)


def _describe(filled: _Filled) -> dict[str, Any]:
    spec, total = filled.spec, _total(filled.sources)
    return {
        "name": spec.name,
        "asked": spec.samples,
        "sequences": len(filled.sequences),
        "tokens": sum(len(sequence) for sequence in filled.sequences),
        "min_tokens": spec.min_tokens,
        "max_tokens": spec.max_tokens,
        "seed": spec.seed,
        "records": total.records,
        "too_short": filled.too_short,
        "filtered": total.filtered,
        "bad": {
            "records": total.bad.total(),
            "kinds": dict(sorted(total.bad.items())),
            "examples": [example._asdict() for example in total.examples],
        },
        "sources": [source.facts | {"records": source.tally.records} for source in filled.sources],
    }


def _digest(tokens: np.ndarray, lengths: np.ndarray, pass_of: np.ndarray) -> str:
    """sha256 over the little-endian bytes of the three arrays."""
    digest = hashlib.sha256()
    for array, dtype in ((tokens, "<i4"), (lengths, "<i8"), (pass_of, "u1")):
        digest.update(np.ascontiguousarray(array, dtype=dtype).data)
    return digest.hexdigest()


def _damaged(folder: Path) -> str:
    return (
        f"the token sequences kept in {folder} ({TOKENS_FILE}, {RECORD_FILE}) are missing or not as"
        " they were written: remove the two files and run the same command again."
    )
