"""Write the report and the card into the checkpoint, and nothing over what a person wrote."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fourge.checkpoint.writer import write_file, writing
from fourge.layerwise.folders import OWN_FOLDER
from fourge.reports.card import ServeCommand, is_sealed, read_card, render_card
from fourge.reports.page import render_page
from fourge.reports.records import Records, read_records

CARD = "README.md"
REPORT = f"{OWN_FOLDER}/report.html"
SOURCE_CARD = f"{OWN_FOLDER}/source-README.md"
CARD_ASIDE = f"{OWN_FOLDER}/README.md"


@dataclass(frozen=True)
class Written:
    """Where things are. ``kept``: the card that a person wrote and that was left alone."""

    report: Path
    card: Path
    kept: Path | None
    records: Records


def write_report(folder: Path, *, force: bool, commands: Sequence[ServeCommand]) -> Written:
    """Write fourge/report.html and the model card.

    README.md is written where there is none, or one that fourge wrote, or the unchanged one of the
    source, which moves to fourge/source-README.md. Any other stays unless ``force``; the new card
    is then fourge/README.md. ``commands``: how to serve it, for the card.
    Raises CheckpointError, ConfigError, OutputError.
    """
    records = read_records(folder)
    card, source_card = folder / CARD, folder / SOURCE_CARD
    present = read_card(card)
    with writing(folder / OWN_FOLDER):
        (folder / OWN_FOLDER).mkdir(exist_ok=True)
    from_source = _is_of_source(records, card)
    if from_source:
        write_file(source_card, card.read_bytes())
    text = render_card(records, read_card(source_card), commands)
    may_replace = force or present is None or from_source or is_sealed(present)
    place = card if may_replace else folder / CARD_ASIDE
    write_file(place, text.encode())
    if may_replace:
        (folder / CARD_ASIDE).unlink(missing_ok=True)
    write_file(folder / REPORT, render_page(records).encode())
    return Written(folder / REPORT, place, None if may_replace else card, records)


def _is_of_source(records: Records, card: Path) -> bool:
    """Whether the card is the one that quantize took over from the source, byte for byte."""
    theirs = records.run.copied.get(CARD) if records.run else None
    return card.exists() and hashlib.sha256(card.read_bytes()).hexdigest() == theirs
