"""What each tensor of a repaired checkpoint becomes: its own bytes, the source's, or made anew.

Decided from headers, findings and scalars; large tensors are read only to learn the largest weight
of a projection that is quantized again.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fourge.checkpoint.header import TensorInfo
from fourge.checkpoint.names import PROJECTIONS, Role, expert_name, find, split_fused
from fourge.checkpoint.writer import OutTensor
from fourge.doctor.comparison import Weights
from fourge.doctor.evidence import Evidence, Projection
from fourge.doctor.files import LocalFiles
from fourge.doctor.findings import Finding
from fourge.doctor.inputs import fitting_inputs
from fourge.doctor.mending import PARTS, Mended, Mender
from fourge.doctor.rewriting import Copy, Made, Output
from fourge.doctor.scales import POOLS, is_weight_only, pool_of
from fourge.doctor.suspects import Diagnosis
from fourge.errors import ConfigError
from fourge.formats.layout import packed_shape, scale_shape
from fourge.models.config import ModelConfig, from_dict
from fourge.models.tensors import expected_tensors, projection_shape

# Findings whose tensors are left out, copied from the source, or quantized again.
DROPPED = {"S11", "Q16", "Q17", "M03", "K10"}
COPIED = {"K08", "K09", "D01", "D02", "D03", "M06", "X09", "X10", "C09"}
QUANTIZED = {
    "S01", "S02", "S03", "S04", "S06", "S07", "S08", "S10",
    "V01", "V02", "V05", "K06", "K08", "D03", "D04", "D05",
}  # fmt: skip
SCALES = ("weight_scale", "weight_scale_2", "input_scale")
DTYPES = {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32", "input_scale": "F32"}
EXPERT_PLACE = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)")

Pool = tuple[int, int, str]  # layer, expert, "gate_up" or "down"


@dataclass
class Replacement:
    """The tensors of the result, and how they came to be."""

    outputs: dict[str, Output] = field(default_factory=dict)
    packed_layers: set[int] = field(default_factory=set)
    num_layers: int = 0
    from_source: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    mended: Mended = field(default_factory=Mended)
    missing: list[str] = field(default_factory=list)
    inputs_left: list[str] = field(default_factory=list)
    without_mtp: bool = False  # left out, for want of a source
    plain_mtp: bool = False  # its packed experts are replaced by the source's
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
    config = _config(evidence, findings)
    replacement = Replacement(num_layers=config.num_hidden_layers if config else 0)
    _keep_own(evidence, findings, replacement)
    _choose_layers(evidence, config, replacement)
    if config is not None:
        _take_missing(evidence, config, replacement)
    _take_named(evidence, findings, replacement)
    _mend_experts(evidence, findings, diagnoses, config, replacement)
    _fill_inputs(evidence, findings, config, replacement)
    return replacement


def _config(evidence: Evidence, findings: Sequence[Finding]) -> ModelConfig | None:
    """What the result must hold. An MTP layer that is nowhere is not demanded."""
    rules = {finding.rule for finding in findings}
    raw = evidence.corrected or evidence.raw
    if evidence.source is not None and evidence.source.raw:
        mtp = evidence.raw.get("num_nextn_predict_layers")
        raw = dict(evidence.source.raw)
        if isinstance(mtp, int) and not rules & {"M01", "M02", "M10"}:
            raw["num_nextn_predict_layers"] = mtp
    elif rules & {"M01", "M02"}:
        raw = dict(raw) | {"num_nextn_predict_layers": 0}
    try:
        return from_dict(raw)
    except ConfigError:
        return evidence.config


def _own_copy(evidence: Evidence, info: TensorInfo) -> Output:
    assert isinstance(evidence.files, LocalFiles)
    return Output(OutTensor(info.name, info.dtype, info.shape), Copy(evidence.files, info))


def _keep_own(evidence: Evidence, findings: Sequence[Finding], replacement: Replacement) -> None:
    dropped = {place for one in findings if one.rule in DROPPED for place in one.places}
    rules = {finding.rule for finding in findings}
    replacement.without_mtp = evidence.source is None and bool(rules & {"M01", "M02"})
    replacement.plain_mtp = evidence.source is not None and "M05" in rules
    named = set((evidence.index or {}).values())
    for name, info in evidence.tensors.items():
        parsed = find(name)
        stray = parsed is None and bool(named) and info.file not in named
        mtp = (
            parsed is not None
            and parsed.layer is not None
            and parsed.layer >= replacement.num_layers
        )
        packed_mtp = mtp and parsed is not None and parsed.part is not None
        unwanted = (mtp and replacement.without_mtp) or (packed_mtp and replacement.plain_mtp)
        if name in dropped or stray or unwanted:
            replacement.dropped.append(name)
        else:
            replacement.outputs[name] = _own_copy(evidence, info)


def _choose_layers(
    evidence: Evidence, config: ModelConfig | None, replacement: Replacement
) -> None:
    """Layers with packed experts; a decoder layer that lost all of them was one if others are."""
    packed = evidence.quantized_layers()
    if config is not None and packed:
        packed |= {
            layer
            for layer in range(config.num_hidden_layers)
            if config.is_sparse(layer) and layer not in evidence.by_layer
        }
    if replacement.plain_mtp:
        packed = {layer for layer in packed if layer < replacement.num_layers}
    replacement.packed_layers = packed


# ---- from the source


def _originals(evidence: Evidence) -> Mapping[str, TensorInfo]:
    if evidence.source is None:
        return {}
    known = {name: info for name, info in evidence.source.tensors.items() if find(name) is not None}
    return split_fused(known)


def _take(evidence: Evidence, info: TensorInfo, replacement: Replacement) -> None:
    """Copy a tensor of the source, and leave out the scales that ours had."""
    assert evidence.source is not None
    assert isinstance(evidence.source.files, LocalFiles)
    copy = Copy(evidence.source.files, info)
    replacement.outputs[info.name] = Output(OutTensor(info.name, info.dtype, info.shape), copy)
    replacement.from_source.append(info.name)
    stem = info.name.removesuffix("weight")
    for scale in SCALES:
        if stem != info.name and replacement.outputs.pop(stem + scale, None) is not None:
            replacement.dropped.append(stem + scale)


def _take_missing(evidence: Evidence, config: ModelConfig, replacement: Replacement) -> None:
    originals = _originals(evidence)
    for name in expected_tensors(config):
        parsed = find(name)
        assert parsed is not None
        packed = parsed.role == Role.ROUTED_EXPERT and parsed.layer in replacement.packed_layers
        if packed or name in replacement.outputs:
            continue
        if name in originals:
            _take(evidence, originals[name], replacement)
        else:
            replacement.missing.append(name)


def _take_named(evidence: Evidence, findings: Sequence[Finding], replacement: Replacement) -> None:
    originals = _originals(evidence)
    for finding in findings:
        for place in finding.places if finding.rule in COPIED else ():
            parsed = find(place)
            packed = (
                parsed is not None
                and parsed.role == Role.ROUTED_EXPERT
                and parsed.layer in replacement.packed_layers
            )
            if place in originals and place not in replacement.from_source and not packed:
                _take(evidence, originals[place], replacement)


# ---- packed experts


def _mend_experts(
    evidence: Evidence,
    findings: Sequence[Finding],
    diagnoses: Sequence[Diagnosis],
    config: ModelConfig | None,
    replacement: Replacement,
) -> None:
    damaged = _damaged(evidence, findings, config, replacement)
    weights = Weights(evidence, evidence.source) if evidence.source is not None else None
    mender = Mender(evidence, weights, diagnoses)
    for (layer, expert, pool), own in sorted(damaged.items()):
        projections = [_projection(evidence, layer, expert, name) for name in POOLS[pool]]
        mender.mend(projections, own)
    mended = mender.mended
    for name, made in mended.made.items():
        replacement.outputs[name] = Output(_out_tensor(evidence, config, name), made)
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
    config: ModelConfig | None,
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
    for layer, expert, name in _expected_projections(evidence, config, replacement):
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
    evidence: Evidence, config: ModelConfig | None, replacement: Replacement
) -> Iterator[tuple[int, int, str]]:
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
    if own is not None and own.dtype == dtype and (config is None or len(own.shape) < 2):
        return OutTensor(name, dtype, own.shape)
    if parsed.part in ("weight_scale_2", "input_scale"):
        return OutTensor(name, dtype, ())
    assert config is not None
    shape = projection_shape(config, parsed.projection)
    return OutTensor(
        name, dtype, packed_shape(shape) if parsed.part == "weight" else scale_shape(shape)
    )


# ---- input scales


def _fill_inputs(
    evidence: Evidence,
    findings: Sequence[Finding],
    config: ModelConfig | None,
    replacement: Replacement,
) -> None:
    if is_weight_only(evidence) or not any(
        name.endswith(".input_scale") and ".experts." in name for name in evidence.tensors
    ):
        replacement.weight_only = True
        return
    odd = {place for one in findings if one.rule == "A08" for place in one.places}
    expected = _expected_projections(evidence, config, replacement)
    values, replacement.inputs_left = fitting_inputs(evidence, expected, odd)
    for tensor, value in values.items():
        out = _out_tensor(evidence, config, tensor)
        scale = torch.tensor(value, dtype=torch.float32).reshape(out.shape)
        made = Made(f"value {value!r}", lambda scale=scale: scale)
        replacement.outputs[tensor] = Output(out, made)
