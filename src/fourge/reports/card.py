"""The model card: README.md of a checkpoint, for people on the hub.

The metadata header is YAML, the rest Markdown. Figures are those on record; what was not measured
is said to be so. The last line holds a hash of the card, by which fourge knows its own.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml

from fourge import __version__
from fourge.layerwise.budget import format_bytes
from fourge.reports.evaluations import Evaluation, Lane, Plain
from fourge.reports.page import TEMPLATES
from fourge.reports.records import Records
from fourge.reports.wording import (
    changed_since,
    doctor_verdict,
    integer,
    is_nvfp4,
    joined,
    kl,
    kl_interval,
    lane_title,
    percent,
    perplexity,
    verdict,
)

SEAL = re.compile(r"<!-- made by fourge [^ ]+, sha256 ([0-9a-f]{64}) -->\n\Z")


class ServeCommand(NamedTuple):
    """How an engine is started on some machine: ``title`` names both."""

    title: str
    text: str


# What a header of the source's card may hand on: facts about the model, not about its files.
HANDED_ON = ("license", "license_name", "license_link", "language")


def render_card(
    records: Records, source_card: str | None, commands: Sequence[ServeCommand] = ()
) -> str:
    """The card as Markdown, sealed. ``source_card``: that of the BF16 model, for its licence."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters["cell"] = _cell
    latest = records.evaluations[0] if records.evaluations else None
    body = environment.get_template("card.md.jinja").render(
        header=yaml.safe_dump(_header(records, source_card), sort_keys=False, allow_unicode=True),
        records=records,
        size=format_bytes(records.bytes),
        source_size=format_bytes(records.run.bytes_in) if records.run else None,
        is_nvfp4=is_nvfp4(records),
        excluded=joined((f"`{name}`" for name in records.excluded), most=20),
        mtp=_mtp(records),
        coverage=records.coverage,
        evaluation=latest,
        measured=_measured(latest) if latest else [],
        changed=latest is not None and changed_since(latest.receipt.files, records),
        doctor=_doctor(records),
        commands=commands,
        text=_WORDS,
        version=__version__,
    )
    return seal(body + "\n\n")


def seal(body: str) -> str:
    """``body`` with a last line by which ``is_sealed`` knows that nobody has changed it."""
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f"{body}<!-- made by fourge {__version__}, sha256 {digest} -->\n"


def is_sealed(card: str) -> bool:
    """Whether fourge wrote this card and nobody has changed it since."""
    found = SEAL.search(card)
    return found is not None and (
        hashlib.sha256(card[: found.start()].encode()).hexdigest() == found[1]
    )


_WORDS = {
    "integer": integer,
    "joined": joined,
    "kl": kl,
    "kl_interval": kl_interval,
    "lane_title": lane_title,
    "percent": percent,
    "perplexity": perplexity,
    "verdict": verdict,
}


def _cell(text: str) -> str:
    """Text as it may stand in a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _header(records: Records, source_card: str | None) -> dict[str, Any]:
    theirs = _front_matter(source_card)
    header: dict[str, Any] = {name: theirs[name] for name in HANDED_ON if name in theirs}
    base = _base_model(records, theirs)
    if base:
        header |= {"base_model": base, "base_model_relation": "quantized"}
    header |= {"pipeline_tag": "text-generation", "library_name": "transformers"}
    tags = ["fourge", "modelopt", *(["nvfp4"] if is_nvfp4(records) else [])]
    return header | {"tags": tags}


def _front_matter(card: str | None) -> dict[str, Any]:
    """The YAML header of a card, {} where there is none that can be read."""
    found = re.match(r"---\s*\n(.*?)\n---\s*\n", card or "", re.DOTALL)
    try:
        header = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return header if isinstance(header, dict) else {}


def _base_model(records: Records, theirs: dict[str, Any]) -> str | None:
    """The hub id of the source where a file names it; a folder's name is none."""
    named = theirs.get("base_model") or records.config.get("_name_or_path")
    return named if isinstance(named, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", named) else None


def _mtp(records: Records) -> str:
    if not records.config.get("num_nextn_predict_layers"):
        return "left out" if records.run and records.run.mtp == "drop" else "none"
    return "kept in BF16, byte for byte" if records.run else "kept"


def _measured(evaluation: Evaluation) -> list[tuple[Lane, list[tuple[str, Plain]]]]:
    """Every lane with its groups: all, by kind, within and beyond index_topk where they exist."""
    found = []
    for lane in evaluation.lanes:
        groups = [("all", lane.whole), *lane.by_kind.items()]
        for name, figures in (
            ("positions within index_topk", lane.within_topk),
            ("positions beyond index_topk", lane.beyond_topk),
        ):
            if figures is not None and figures.tokens:
                groups.append((name, figures))
        found.append((lane, groups))
    return found


def _doctor(records: Records) -> str | None:
    doctor = records.doctor
    if doctor is None:
        return None
    changed = " The checkpoint has changed since." if changed_since(doctor.files, records) else ""
    return (
        f"`fourge doctor` {doctor.fourge}: {doctor_verdict(doctor)};"
        f" {len(doctor.checked)} rules checked on {doctor.checked_at}.{changed}"
    )


def read_card(path: Path) -> str | None:
    """The text of a card, None where there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
