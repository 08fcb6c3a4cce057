"""All rules on numbers, in order: scalars, block scales, and with a source the weights themselves.

Each place is named once, by the most specific rule: damaged scales (S01, S02, S03), then scales
that do not belong together (S04, S06), then what the source shows (S07, S08, V).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from fourge.doctor.activations import check_input_scales, input_scale_figures
from fourge.doctor.blocks import (
    BlockFacts,
    check_blocks,
    is_max_export,
    names_zero_expert,
    sampled_expert,
    scan_blocks,
    typical_scales,
)
from fourge.doctor.comparison import (
    FAR,
    FAR_FITTED,
    Comparison,
    Weights,
    check_bits,
    check_blocks_against_max,
    check_zeros,
    comparable,
    compare_experts,
    error_figures,
    suspicious,
)
from fourge.doctor.evidence import Evidence
from fourge.doctor.findings import Finding
from fourge.doctor.passes import Progress
from fourge.doctor.scales import check_scalars, expert_place
from fourge.doctor.suspects import Diagnosis, check_diagnoses, diagnose
from fourge.doctor.unquantized import check_empty, check_unquantized

SCALARS = (
    "S03", "S04", "S05", "S11", "S12", "S13",
    "A01", "A02", "A03", "A04", "A05", "A06", "A07", "A08", "A09", "A11", "Q16",
)  # fmt: skip
BLOCKS = ("S01", "S02", "S09", "S10")
AGAINST_SOURCE = ("K08", "K09", "S07", "S08", "V01", "V02", "V05")
# Rules that explain why a projection is far from its source.
EXPLAINED_BY = ("S01", "S02", "S03", "S04", "K08")
EXPLAINED_BY_S06 = ("S07", "V02")


@dataclass
class Numbers:
    """What the rules on numbers found, and what the repair needs to know."""

    findings: list[Finding] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    not_checked: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    facts: list[BlockFacts] = field(default_factory=list)
    diagnoses: list[Diagnosis] = field(default_factory=list)


@dataclass(frozen=True)
class Depth:
    """How much is read. ``sample``: one expert per layer. ``memory``: bytes for tensors."""

    sample: bool = False
    memory: int | None = None


def check_numbers(evidence: Evidence, depth: Depth, on_progress: Progress) -> Numbers:
    """All rules of SCALARS, BLOCKS and AGAINST_SOURCE, S06, V03 and V04."""
    numbers = Numbers()
    whole = evidence.files.is_local or depth.sample
    if whole:
        numbers.facts = scan_blocks(
            evidence, sample=depth.sample, memory=depth.memory, on_progress=on_progress
        )
        numbers.findings += check_blocks(evidence, numbers.facts)
        numbers.checked += BLOCKS
        if is_max_export(numbers.facts):
            numbers.checked.append("S06")
        else:
            numbers.not_checked["S06"] = "holds for max exports only"
    else:
        numbers.not_checked |= dict.fromkeys(
            (*BLOCKS, "S06"), "reads all block scales: local files, or --sample"
        )
    zero_experts = names_zero_expert(evidence, numbers.facts)
    numbers.findings += check_scalars(evidence, zero_experts, typical_scales(numbers.facts))
    numbers.findings += check_input_scales(evidence)
    numbers.findings += check_empty(evidence)
    numbers.checked += SCALARS
    numbers.figures["input_scale"] = input_scale_figures(evidence)
    _check_against_source(evidence, depth, on_progress, numbers)
    return numbers


def _check_against_source(
    evidence: Evidence, depth: Depth, on_progress: Progress, numbers: Numbers
) -> None:
    source = evidence.source
    if source is None or not (evidence.files.is_local or depth.sample):
        reason = (
            "needs --source" if source is None else "reads all weights: local files, or --sample"
        )
        numbers.not_checked |= dict.fromkeys((*AGAINST_SOURCE, "V03", "V04"), reason)
        return
    numbers.findings += check_unquantized(
        evidence, source, sample=depth.sample, memory=depth.memory, on_progress=on_progress
    )
    weights = Weights(evidence, source)
    experts = comparable(weights, _chosen(evidence, depth.sample))
    comparisons = compare_experts(weights, experts, memory=depth.memory, on_progress=on_progress)
    _judge(weights, comparisons, on_progress, numbers)
    numbers.figures |= error_figures(comparisons)
    numbers.checked += AGAINST_SOURCE


def _chosen(evidence: Evidence, sample: bool) -> list[tuple[int, int]]:
    if sample:
        return [(layer, sampled_expert(evidence, layer)) for layer in evidence.by_layer]
    return [(layer, expert) for layer, own in evidence.by_layer.items() for expert in own]


def _judge(
    weights: Weights, comparisons: Sequence[Comparison], on_progress: Progress, numbers: Numbers
) -> None:
    """S07, S08, V: what the comparison shows beyond what other rules told."""
    evidence = weights.evidence
    told = _named(evidence, _of_rules(numbers, EXPLAINED_BY))
    far = FAR_FITTED if evidence.is_fitted_to_inputs else FAR
    suspects = [
        one for one in suspicious(comparisons, far=far) if one.projection.tensor() not in told
    ]
    diagnoses = diagnose(weights, suspects, on_progress)
    named = {one.projection.tensor() for one in diagnoses}
    compared = {one.projection.tensor() for one in comparisons if one.is_number}
    numbers.findings = [
        one
        for one in numbers.findings
        if _stands(one.rule, _named(evidence, [one]), named, compared)
    ]
    overwritten = _named(evidence, _of_rules(numbers, ("S06",)))
    numbers.diagnoses = [
        one
        for one in diagnoses
        if one.rule not in EXPLAINED_BY_S06 or one.projection.tensor() not in overwritten
    ]
    told |= overwritten
    numbers.findings += check_zeros(comparisons, told)
    numbers.findings += check_diagnoses(numbers.diagnoses)
    if is_max_export(numbers.facts):
        numbers.findings += check_bits(comparisons, told | named)
        numbers.checked.append("V03")
        numbers.not_checked["V04"] = "a max export is what it would be compared with"
    else:
        if evidence.is_fitted_to_inputs:
            reason = "fourge/run.json says that weights were fitted to inputs, not to the source's"
            numbers.not_checked["V04"] = reason
        else:
            numbers.findings += check_blocks_against_max(comparisons, told | named)
            numbers.checked.append("V04")
        numbers.not_checked["V03"] = "holds for max exports only"


def _stands(rule: str, places: set[str], named: set[str], compared: set[str]) -> bool:
    """Whether a finding that is drawn from what scales usually look like says more than the source
    does, with which ``compared`` weights were compared and the ``named`` ones differ.
    """
    if rule == "S09":
        return not places <= named
    if rule == "S06":
        return not places <= compared or not places.isdisjoint(named)
    return rule != "S05" or not places <= compared


def _of_rules(numbers: Numbers, rules: Collection[str]) -> list[Finding]:
    return [one for one in numbers.findings if one.rule in rules]


def _named(evidence: Evidence, findings: Sequence[Finding]) -> set[str]:
    """Weights (tensor names) that findings name, or whose expert they name."""
    places = {place for one in findings for place in one.places}
    return {
        projection.tensor()
        for projection in evidence.experts.values()
        if not places.isdisjoint(
            (
                projection.tensor(),
                projection.tensor("weight_scale"),
                projection.tensor("weight_scale_2"),
                expert_place(projection),
            )
        )
    }
