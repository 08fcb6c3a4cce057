"""The tokens that are evaluated: windows of conversations or texts, by kind of data.

A window is one record of the data, rendered and tokenized as for calibration, cut at ``context``
tokens; no two records share a window. Kinds share the number of tokens evenly.
"""

from collections.abc import Sequence
from pathlib import Path

from fourge.calibrate.corpus import MAX_PASSES, Corpus, PassSpec, Progress, build_corpus
from fourge.calibrate.sources import DatasetId, find_data
from fourge.errors import DataError
from fourge.evaluate.figures import Windows
from fourge.models.survey import Source

LEAST_TOKENS = 2  # one position that a token follows
MAX_BAD_SHARE = 0.1
MOST_WINDOWS = 1 << 20


def kinds_of(data: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Kind -> its data. ``KIND=PATH`` names it; a file's kind is its stem, a folder's files are a
    kind each, a dataset's kind is its name.
    """
    kinds: dict[str, list[str]] = {}
    for item in data:
        name, separator, rest = item.partition("=")
        if separator and name and "/" not in name and not Path(item).exists():
            kinds.setdefault(name, []).append(rest)
            continue
        for place in find_data([item]):
            is_dataset = isinstance(place, DatasetId)
            kind = place.repo.rpartition("/")[2] if is_dataset else place.stem
            kinds.setdefault(kind, []).append(place.text if is_dataset else str(place))
    return {kind: tuple(places) for kind, places in kinds.items()}


def pass_specs(data: Sequence[str], *, tokens: int, context: int, seed: int) -> list[PassSpec]:
    """One pass per kind of ``data``. DataError where the tokens do not suffice for all kinds."""
    kinds = kinds_of(data)
    if len(kinds) > MAX_PASSES:
        raise DataError(
            f"there are {len(kinds)} kinds of data, at most {MAX_PASSES} can be told apart: give"
            " files a kind in common, --data KIND=FOLDER."
        )
    share = tokens // len(kinds)
    if share < LEAST_TOKENS:
        raise DataError(
            f"{tokens} tokens are too few for {len(kinds)} kinds of data: raise --tokens."
        )
    return [
        PassSpec(
            name=kind,
            data=places,
            samples=MOST_WINDOWS,
            min_tokens=LEAST_TOKENS,
            max_tokens=context,
            seed=seed,
            open_ended=True,
            most_tokens=share,
            from_recipe=False,
        )
        for kind, places in kinds.items()
    ]


def gather(specs: Sequence[PassSpec], reference: Source, on_data: Progress) -> Corpus:
    """Draw the windows, with the reference's tokenizer and chat template. Raises DataError."""
    return build_corpus(
        specs,
        checkpoint=reference.folder,
        vocab_size=reference.config.vocab_size,
        max_bad_share=MAX_BAD_SHARE,
        on_progress=on_data,
    )


def windows_of(corpus: Corpus) -> Windows:
    """The corpus's sequences as windows."""
    return Windows(corpus.passes, corpus.pass_of.astype(int), corpus.lengths)
