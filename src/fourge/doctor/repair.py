"""``--repair OUT``: a whole new checkpoint with everything put right that can be put right exactly.

The input is never changed, and OUT stands alone. What each tensor becomes is decided from headers,
findings and scalars before anything is written: a copy of its own bytes, a copy of the source's, or
made anew (plan: replacing.py; numbers: mending.py); files beside the weights: restoring.py;
writing: rewriting.py. Needs local files.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fourge.checkpoint.names import find
from fourge.checkpoint.writer import write_json
from fourge.doctor.evidence import Evidence
from fourge.doctor.examine import Report, examine, look_at
from fourge.doctor.experts import Depth
from fourge.doctor.files import LocalFiles
from fourge.doctor.findings import Finding, rules
from fourge.doctor.passes import Progress
from fourge.doctor.replacing import Replacement, replace_tensors
from fourge.doctor.restoring import Layers, Restored, restore_files
from fourge.doctor.rewriting import RECORD, Rewriting, check_target, write_checkpoint
from fourge.doctor.sharding import place_tensors
from fourge.doctor.suspects import Diagnosis
from fourge.errors import OutputError

# What findings of a rule are put right by.
MISSING_RULES = {"K01", "K02", "K05", "K06", "M01", "M02", "X01", "X09"}
INDEX_RULES = {"K03", "K04", "M07"}
DROP_RULES = {"S11", "Q16", "Q17", "M03"}
INPUT_RULES = {"A01", "A02", "A03", "A08"}
# Modules that were packed and are BF16 now must be in the exclude list.
UNPACKED_RULES = {"Q12", "D02", "M06", "X09", "X10", "M05"}


def check_repair(evidence: Evidence, out: Path) -> None:
    """OutputError if a repair into ``out`` cannot begin; before anything large is read."""
    for place in (evidence, evidence.source):
        if place is not None and not isinstance(place.files, LocalFiles):
            raise OutputError(
                f"{place.files.place} is not on this machine; --repair copies whole checkpoints:"
                " download it first."
            )
    for place in (evidence, evidence.source):
        folder = Path(place.files.place).resolve() if place is not None else None
        own = out.resolve()
        if folder is not None and (own == folder or folder in own.parents or own in folder.parents):
            raise OutputError(
                f"the output folder {out} overlaps {folder}, which is never changed: choose"
                " another place for it."
            )
    check_target(out)


def repair(
    evidence: Evidence,
    findings: Sequence[Finding],
    diagnoses: Sequence[Diagnosis],
    out: Path,
    on_progress: Progress,
) -> dict[str, Any]:
    """Write the repaired checkpoint; ``{"written", "done": [...], "not_done": [{rule, why}]}``.

    Nothing is written where nothing can be done. OutputError, BudgetError: see write_checkpoint.
    """
    check_repair(evidence, out)
    replacement = replace_tensors(evidence, findings, diagnoses)
    restored = restore_files(
        evidence, _rules_of_files(evidence, findings), _layers(evidence, findings, replacement)
    )
    done = _done(findings, replacement, restored)
    record = {
        "checkpoint": evidence.files.place,
        "source": evidence.source.files.place if evidence.source else None,
        "written": bool(done),
        "done": [{"rule": rule, "what": what} for rule, what in done.items()],
        "not_done": [
            {"rule": rule, "where": finding.where, "why": _why(evidence, finding, replacement)}
            for finding in findings
            if (rule := finding.rule) not in done
        ],
    }
    if done:
        details = {
            "from_source": sorted(replacement.from_source),
            "made": {name: made.how for name, made in replacement.made.items()},
            "dropped": replacement.dropped,
        }
        rewriting = _rewriting(evidence, replacement, restored)
        write_checkpoint(out, rewriting, record | {"tensors": details}, on_progress)
    return record


def repair_and_examine(
    evidence: Evidence, report: Report, out: Path, depth: Depth, on_progress: Progress
) -> dict[str, Any]:
    """``repair``, and then the doctor on what was written: ``"left"`` has its findings.

    A rule that still fires there was not put right, whatever was done for it.
    """
    record = repair(evidence, report.findings, report.numbers.diagnoses, out, on_progress)
    if not record["written"]:
        return record | {"left": [one.to_dict() for one in report.findings]}
    source = evidence.source.files.place if evidence.source is not None else None
    left = examine(look_at(out, source), depth, on_progress).findings
    still = {finding.rule for finding in left}
    record["not_done"] += [
        {"rule": one["rule"], "where": "", "why": f"done, and not enough: {one['what']}"}
        for one in record["done"]
        if one["rule"] in still
    ]
    record["done"] = [one for one in record["done"] if one["rule"] not in still]
    record["left"] = [one.to_dict() for one in left]
    stored = json.loads((out / RECORD).read_bytes())
    write_json(out / RECORD, stored | record)
    return record


def _rules_of_files(evidence: Evidence, findings: Sequence[Finding]) -> set[str]:
    """Rules whose findings concern JSON files. D04 is one of metadata or of tensors; Q11 one of
    tensors where shared experts are packed.
    """
    fired = {finding.rule for finding in findings}
    return {
        finding.rule
        for finding in findings
        if (finding.rule != "D04" or all(".json" in place for place in finding.places))
        and (finding.rule != "Q11" or "Q12" not in fired or evidence.source is not None)
    }


def _layers(evidence: Evidence, findings: Sequence[Finding], replacement: Replacement) -> Layers:
    """Which layers of the result are quantized."""
    config = replacement.config
    decoder = range(config.num_hidden_layers) if config is not None else range(0)
    packed = replacement.packed_layers
    extra = sorted(layer for layer in replacement.present_layers if layer not in decoder)
    return Layers(
        unquantized=tuple(layer for layer in decoder if layer not in packed),
        plain_mtp=tuple(layer for layer in extra if layer not in packed),
        packed_mtp=tuple(layer for layer in extra if layer in packed),
        drops_mtp=not extra and bool(evidence.raw.get("num_nextn_predict_layers", 1)),
        weight_only=replacement.weight_only,
        unpacks=bool(replacement.from_source)
        and any(finding.rule in UNPACKED_RULES for finding in findings),
    )


def _rewriting(evidence: Evidence, replacement: Replacement, restored: Restored) -> Rewriting:
    shards, whole, index = place_tensors(evidence, replacement.outputs)
    copies = {
        name: files for name, files in restored.copies.items() if isinstance(files, LocalFiles)
    }
    rewriting = Rewriting(shards, whole, dict(restored.texts), copies)
    if index is not None:
        name, data = index
        if data is None and isinstance(evidence.files, LocalFiles):
            rewriting.copies[name] = evidence.files
        elif data is not None:
            rewriting.texts[name] = data
    return rewriting


def _done(
    findings: Sequence[Finding], replacement: Replacement, restored: Restored
) -> dict[str, str]:
    """Rule -> what was done, for rules all of whose findings are put right."""
    done: dict[str, str] = {}
    failed: set[str] = set()
    for finding in findings:
        what = _what(finding, replacement, restored)
        if what is None:
            failed.add(finding.rule)
        else:
            done[finding.rule] = what
    return {rule: what for rule, what in done.items() if rule not in failed}


def _what(finding: Finding, replacement: Replacement, restored: Restored) -> str | None:
    """What put a finding right; None if nothing did."""
    rule, outputs = finding.rule, replacement.outputs
    if rule in ("M01", "M02") and replacement.without_mtp:
        return "num_nextn_predict_layers set to 0: the MTP layer needs --source"
    if rule == "M05":
        return replacement.told_all() if replacement.plain_mtp else None
    if rule in ("K07", "K10") and any(place in outputs for place in finding.places):
        return None
    if rule in MISSING_RULES and (replacement.missing or replacement.inputs_left):
        return None
    if rule in restored.done:
        return restored.done[rule]
    if rule in ("X01", "X09") and not replacement.from_source:
        return None
    if rule in MISSING_RULES:
        return replacement.told_all() or "index made anew"
    if rule in INDEX_RULES:
        return "index made anew from the shards"
    if rule in DROP_RULES:
        return "tensors left out"
    if rule in INPUT_RULES:
        told = "input_scale filled in: the largest of its layer"
        return None if replacement.inputs_left else told
    if rule == "K07":
        names = {name for name in outputs if find(name) is None}
        return None if names else "tensors given their published names, one per expert"
    return replacement.told(finding)


def _why(evidence: Evidence, finding: Finding, replacement: Replacement) -> str:
    rule = rules()[finding.rule]
    if finding.severity == "info":
        return rule.remedy
    if finding.rule in INPUT_RULES | MISSING_RULES and replacement.inputs_left:
        return "no expert of the layer has a usable input_scale: calibrate again"
    needs_source = rule.repair == "source" or "source" in rule.remedy or rule.id == "Q11"
    if evidence.source is None and needs_source:
        return "needs --source"
    return rule.remedy
