"""All rules over one checkpoint, in order: config, tensors, metadata, then numbers (experts.py).

A single accident should have a single finding. Rules of one module see to it themselves; here,
findings on numbers are left out where headers have told what is wrong with all their places.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fourge.doctor import (
    architecture,
    companions,
    completeness,
    metadata,
    mtp,
    settings,
    shapes,
    sharing,
)
from fourge.doctor.evidence import Evidence, gather
from fourge.doctor.experts import Depth, Numbers, check_numbers
from fourge.doctor.files import open_files
from fourge.doctor.findings import SEVERITIES, Finding, found, rules
from fourge.doctor.passes import Progress
from fourge.doctor.sharing import PLAIN_DTYPES
from fourge.errors import CheckpointError

Check = Callable[[Evidence], Iterator[Finding]]
# Rules whose findings explain whatever the numbers of the same tensors look like.
EXPLAIN = {"K01", "K03", "K05", "K06", "K07", "K08", "K10", "M02", "M06", "D02", "D03", "D04",
           "D05", "S11"}  # fmt: skip
REASONS = {
    "run": "no file tells: it shows on a running engine, or in how the checkpoint was made",
    "config": "needs a config.json that can be understood",
    "tokenizer": "a model for tests: its vocabulary is too small for a tokenizer",
}


class Step(NamedTuple):
    """A check, the rules that it settles, and whether it needs ``evidence.config``."""

    check: Check
    rules: tuple[str, ...]
    needs_config: bool = True


STEPS = (
    Step(completeness.check_shards, completeness.RULES, needs_config=False),
    Step(completeness.check_tensors, completeness.RULES_WITH_CONFIG),
    Step(mtp.check_mtp, mtp.RULES),
    Step(sharing.check_indexers, sharing.RULES),
    Step(shapes.check_shapes, shapes.RULES),
    Step(metadata.check_metadata, metadata.RULES),
    Step(companions.check_companions, companions.RULES, needs_config=False),
)


@dataclass
class Report:
    """What was found, what was looked at, and what was not and why."""

    checkpoint: str
    findings: list[Finding]
    checked: list[str]
    not_checked: dict[str, str]
    figures: dict[str, Any]
    numbers: Numbers = field(repr=False)

    @property
    def has_errors(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` shows it."""
        return {
            "checkpoint": self.checkpoint,
            "findings": [finding.to_dict() for finding in self.findings],
            "checked": self.checked,
            "not_checked": self.not_checked,
            "figures": self.figures,
        }


def look_at(checkpoint: str | Path, source: str | Path | None) -> Evidence:
    """Read headers and small files of a checkpoint, and of its source if that is given.

    Raises CheckpointError where there is nothing to examine.
    """
    evidence = gather(open_files(checkpoint))
    _check_quantized(evidence)
    evidence.source = gather(open_files(source)) if source is not None else None
    return evidence


def _check_quantized(evidence: Evidence) -> None:
    """CheckpointError for a checkpoint that nobody has quantized: nothing here would look at it."""
    is_declared = "quantization_config" in evidence.raw or evidence.hf_quant is not None
    plain = all(info.dtype in PLAIN_DTYPES for info in evidence.tensors.values())
    if evidence.tensors and plain and not (evidence.damaged or evidence.lost or is_declared):
        dtypes = ", ".join(sorted({info.dtype for info in evidence.tensors.values()}))
        raise CheckpointError(
            f"{evidence.files.place} is not quantized: its tensors are {dtypes}; give the NVFP4"
            " checkpoint that was made from it, and this as --source."
        )


def examine(evidence: Evidence, depth: Depth, on_progress: Progress) -> Report:
    """Apply every rule. CheckpointError if the model is of no family that fourge knows."""
    findings = list(architecture.check_architecture(evidence))
    checked, not_checked = _static(evidence)
    if evidence.config is not None:
        findings += [*settings.check_settings(evidence, findings)]
    for step in STEPS:
        if evidence.config is None and step.needs_config:
            not_checked |= dict.fromkeys(step.rules, REASONS["config"])
            continue
        findings += step.check(evidence)
        checked += step.rules
    numbers = check_numbers(evidence, depth, on_progress)
    findings += _unexplained(numbers.findings, findings)
    checked += numbers.checked
    not_checked = {**not_checked, **numbers.not_checked}
    figures = {"shards": completeness.shard_figures(evidence), **numbers.figures}
    return Report(
        checkpoint=evidence.files.place,
        findings=in_order(_merged(findings)),
        checked=sorted({*checked}, key=_place_of),
        not_checked={id: not_checked[id] for id in rules() if id in not_checked},
        figures=figures,
        numbers=numbers,
    )


def _static(evidence: Evidence) -> tuple[list[str], dict[str, str]]:
    """Rules that are settled with the config, and rules that nothing here can settle."""
    not_checked = {id: REASONS["run"] for id, rule in rules().items() if rule.needs == "run"}
    if companions.needs_no_tokenizer(evidence):
        not_checked["K13"] = REASONS["tokenizer"]
    checked = ["C06"] if "K13" in not_checked else ["C06", "K13"]
    if evidence.config is None:
        own = (*architecture.RULES, *settings.RULES)
        not_checked |= dict.fromkeys((id for id in own if id != "C06"), REASONS["config"])
        return checked, not_checked
    return [*checked, *architecture.RULES, *settings.RULES], not_checked


def _unexplained(findings: Iterable[Finding], told: Iterable[Finding]) -> Iterator[Finding]:
    """Findings with a place of which headers have not told what is wrong."""
    named = {stem(place) for one in told if one.rule in EXPLAIN for place in one.places}
    for finding in findings:
        places = [place for place in finding.places if stem(place) not in named]
        if places or not finding.places:
            yield finding


def stem(place: str) -> str:
    """The module of a tensor: its name without "weight", "weight_scale" and so on."""
    return place.rpartition(".")[0] if place.startswith("model.") else place


def _merged(findings: list[Finding]) -> list[Finding]:
    """Q17 without what Q16 names: a scale of 0 is more than a name that nobody loads."""
    bad = {place for one in findings if one.rule == "Q16" for place in one.places}
    kept = []
    for finding in findings:
        if finding.rule == "Q17" and bad:
            places = [place for place in finding.places if place not in bad]
            if places:
                kept.append(found("Q17", places, f"no engine loads {places[0]}."))
        else:
            kept.append(finding)
    return kept


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first, then as the catalogue has them."""
    return sorted(
        findings, key=lambda one: (SEVERITIES.index(one.severity), _place_of(one.rule), one.where)
    )


def _place_of(id: str) -> int:
    return list(rules()).index(id)
