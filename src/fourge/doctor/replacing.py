"""What each tensor of a repaired checkpoint becomes: its own bytes, the source's, or made anew.

Decided from headers, findings and scalars; large tensors are read only to learn the largest weight
of a projection that is quantized again.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from fourge.checkpoint.names import PROJECTIONS, expert_name, find
from fourge.checkpoint.writer import OutTensor
from fourge.doctor.activations import is_weight_only
from fourge.doctor.comparison import Weights
from fourge.doctor.copying import copy_tensors
from fourge.doctor.evidence import Evidence, Projection
from fourge.doctor.findings import Finding
from fourge.doctor.inputs import fitting_inputs
from fourge.doctor.mending import PARTS, Mended, Mender
from fourge.doctor.rewriting import Made, Output
from fourge.doctor.scales import POOLS, pool_of
from fourge.doctor.suspects import Diagnosis
from fourge.formats.layout import packed_shape, scale_shape
from fourge.models.config import ModelConfig
from fourge.models.tensors import projection_shape

# Findings whose projections are quantized again, or mended otherwise.
QUANTIZED = {
    "S01", "S02", "S03", "S04", "S06", "S07", "S08", "S10",
    "V01", "V02", "V05", "K06", "K08", "D03", "D04", "D05",
}  # fmt: skip
DTYPES = {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32", "input_scale": "F32"}
EXPERT_PLACE = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)")

Pool = tuple[int, int, str]  # layer, expert, "gate_up" or "down"


@dataclass
class Replacement:
    """The tensors of the result, and how they came to be."""

    outputs: dict[str, Output]
    config: ModelConfig | None
    packed_layers: set[int]
    from_source: set[str]
    dropped: list[str]
    missing: list[str]
    without_mtp: bool  # the MTP layer is left out, for want of a source
    plain_mtp: bool  # its packed experts are replaced by the source's
    mended: Mended = field(default_factory=Mended)
    inputs_left: list[str] = field(default_factory=list)
    weight_only: bool = False

    @property
    def made(self) -> dict[str, Made]:
        return {
            name: one.content for name, one in self.outputs.items() if isinstance(one.content, Made)
        }

    @property
    def present_layers(self) -> set[int]:
        parsed = map(find, self.outputs)
        return {one.layer for one in parsed if one is not None and one.layer is not None}

    def told(self, finding: Finding) -> str | None:
        """What happened to the places that a finding names; None unless all are sound now."""
        weights, copied = set(), 0
        for place in finding.places:
            if place in self.from_source:
                copied += 1
                continue
            own = _weights_at(place)
            if not own or not own <= self.mended.how.keys():
                return None
            weights |= own
        parts = [self.mended.told(sorted(weights))] if weights else []
        return "; ".join([*parts, *([self.told_copies(copied)] if copied else [])]) or None

    def told_copies(self, count: int) -> str:
        """For so many tensors."""
        return f"{count:,} tensor{'s' if count > 1 else ''} copied from the source"

    def told_all(self) -> str:
        """Everything that was added or mended."""
        parts = [self.mended.told(self.mended.how)] if self.mended.how else []
        if self.from_source:
            parts.append(self.told_copies(len(self.from_source)))
        return "; ".join(parts)


def _weights_at(place: str) -> set[str]:
    """The packed weights that the name of a tensor, or of an expert, stands for."""
    return {expert_name(layer, expert, name) for layer, expert, name in _projections_at(place)}


def replace_tensors(
    evidence: Evidence, findings: Sequence[Finding], diagnoses: Sequence[Diagnosis]
) -> Replacement:
    """Plan all tensors of the result."""
    copies = copy_tensors(evidence, findings)
    replacement = Replacement(
        outputs=copies.outputs,
        config=copies.config,
        packed_layers=copies.packed_layers,
        from_source=copies.from_source,
        dropped=copies.dropped,
        missing=copies.missing,
        without_mtp=copies.without_mtp,
        plain_mtp=copies.plain_mtp,
    )
    _mend_experts(evidence, findings, diagnoses, replacement)
    _fill_inputs(evidence, findings, replacement)
    return replacement


# ---- packed experts


def _mend_experts(
    evidence: Evidence,
    findings: Sequence[Finding],
    diagnoses: Sequence[Diagnosis],
    replacement: Replacement,
) -> None:
    damaged = _damaged(evidence, findings, replacement)
    weights = Weights(evidence, evidence.source) if evidence.source is not None else None
    mender = Mender(evidence, weights, diagnoses)
    for (layer, expert, pool), own in sorted(damaged.items()):
        projections = [_projection(evidence, layer, expert, name) for name in POOLS[pool]]
        mender.mend(projections, own)
    mended = mender.mended
    for name, made in mended.made.items():
        replacement.outputs[name] = Output(_out_tensor(evidence, replacement.config, name), made)
    replacement.mended = mended
    for layer, expert, pool in damaged:
        for name in POOLS[pool]:
            own = _projection(evidence, layer, expert, name)
            replacement.missing += [
                own.tensor(part) for part in PARTS if own.tensor(part) not in replacement.outputs
            ]


def _projection(evidence: Evidence, layer: int, expert: int, name: str) -> Projection:
    found = evidence.experts.get((layer, expert, name))
    return found if found is not None else Projection(layer, expert, name, {})


def _damaged(
    evidence: Evidence,
    findings: Sequence[Finding],
    replacement: Replacement,
) -> dict[Pool, dict[str, set[str]]]:
    """Pools with something to mend: projection name -> the rules that name it."""
    damaged: dict[Pool, dict[str, set[str]]] = {}
    for finding in findings:
        for place in finding.places if finding.rule in QUANTIZED else ():
            for layer, expert, name in _projections_at(place):
                if layer in replacement.packed_layers:
                    pool = damaged.setdefault((layer, expert, pool_of(name)), {})
                    pool.setdefault(name, set()).add(finding.rule)
    for layer, expert, name in _expected_projections(evidence, replacement):
        parts = _projection(evidence, layer, expert, name).parts
        if not set(PARTS) <= parts.keys():
            pool = damaged.setdefault((layer, expert, pool_of(name)), {})
            pool.setdefault(name, set()).add("K06")
    return damaged


def _projections_at(place: str) -> Iterator[tuple[int, int, str]]:
    expert = EXPERT_PLACE.fullmatch(place)
    if expert is not None:
        for name in PROJECTIONS[:2]:
            yield int(expert[1]), int(expert[2]), name
        return
    parsed = find(place)
    if parsed is not None and parsed.layer is not None and parsed.projection is not None:
        assert parsed.expert is not None
        yield parsed.layer, parsed.expert, parsed.projection


def _expected_projections(
    evidence: Evidence, replacement: Replacement
) -> Iterator[tuple[int, int, str]]:
    config = replacement.config
    for layer in sorted(replacement.packed_layers):
        present = evidence.by_layer.get(layer, {})
        experts = range(config.n_routed_experts) if config is not None else present
        for expert in experts:
            for name in PROJECTIONS:
                yield layer, expert, name


def _out_tensor(evidence: Evidence, config: ModelConfig | None, name: str) -> OutTensor:
    """Dtype and shape of a tensor of a packed projection."""
    parsed = find(name)
    assert parsed is not None
    assert parsed.part is not None
    assert parsed.projection is not None
    dtype = DTYPES[parsed.part]
    own = evidence.tensors.get(name)
    if parsed.part in ("weight_scale_2", "input_scale"):
        is_scalar = own is not None and own.shape in ((), (1,))
        return OutTensor(name, dtype, own.shape if own is not None and is_scalar else ())
    if own is not None and own.dtype == dtype and config is None:
        return OutTensor(name, dtype, own.shape)
    assert config is not None
    shape = projection_shape(config, parsed.projection)
    return OutTensor(
        name, dtype, packed_shape(shape) if parsed.part == "weight" else scale_shape(shape)
    )


# ---- input scales


def _fill_inputs(
    evidence: Evidence,
    findings: Sequence[Finding],
    replacement: Replacement,
) -> None:
    if is_weight_only(evidence) or not any(
        name.endswith(".input_scale") and ".experts." in name for name in evidence.tensors
    ):
        replacement.weight_only = True
        return
    odd = {place for one in findings if one.rule == "A08" for place in one.places}
    expected = _expected_projections(evidence, replacement)
    values, replacement.inputs_left = fitting_inputs(evidence, expected, odd)
    for tensor, value in values.items():
        out = _out_tensor(evidence, replacement.config, tensor)
        scale = torch.tensor(value, dtype=torch.float32).reshape(out.shape)
        made = Made(f"value {value!r}", lambda scale=scale: scale)
        replacement.outputs[tensor] = Output(out, made)
