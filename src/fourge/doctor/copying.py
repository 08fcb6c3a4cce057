"""Which tensors of a repaired checkpoint are copies: of its own, or of the source's.

Own tensors keep their bytes, under their published names, fused experts apart; what does not belong
is left out. From the source comes what is missing, what findings name, and with it an MTP layer
that was lost or quantized. Packed experts are for replacing.py. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fourge.checkpoint.header import TensorInfo
from fourge.checkpoint.names import Role, TensorName, find, split_fused
from fourge.checkpoint.writer import OutTensor
from fourge.doctor.evidence import Evidence
from fourge.doctor.files import LocalFiles
from fourge.doctor.findings import Finding
from fourge.doctor.rewriting import Copy, Output
from fourge.errors import CheckpointError, ConfigError
from fourge.models.config import ModelConfig, from_dict
from fourge.models.tensors import expected_tensors

# Findings whose tensors are left out; of K01 those that nobody knows.
DROPPED = {"S11", "Q16", "Q17", "M03", "K01"}
# Findings whose tensors are taken from the source.
COPIED = {"K08", "K09", "D01", "D02", "D03", "M06", "X09", "X10", "C09", "Q12"}
SCALES = ("weight_scale", "weight_scale_2", "input_scale")
FP8_SCALE = "_scale_inv"
MTP_KEY = "num_nextn_predict_layers"


@dataclass
class Copies:
    """Everything but what is made anew. ``config``: what the result must hold, if it is known."""

    config: ModelConfig | None
    outputs: dict[str, Output] = field(default_factory=dict)
    packed_layers: set[int] = field(default_factory=set)
    from_source: set[str] = field(default_factory=set)
    dropped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    without_mtp: bool = False
    plain_mtp: bool = False


def copy_tensors(evidence: Evidence, findings: Sequence[Finding]) -> Copies:
    """Plan them, from headers and findings."""
    rules = {finding.rule for finding in findings}
    has_mtp = bool(evidence.corrected.get(MTP_KEY, evidence.raw.get(MTP_KEY)))
    without_mtp = evidence.source is None and (
        "M02" in rules or ("M01" in rules and not (has_mtp and evidence.mtp_tensors))
    )
    copies = Copies(
        config=_config(evidence, rules, without_mtp),
        without_mtp=without_mtp,
        plain_mtp=evidence.source is not None and "M05" in rules,
    )
    copies.packed_layers = _packed_layers(evidence, copies)
    _keep_own(evidence, findings, copies)
    originals = _originals(evidence)
    _take_missing(evidence, originals, copies)
    _take_named(evidence, findings, originals, copies)
    return copies


def _config(evidence: Evidence, rules: set[str], without_mtp: bool) -> ModelConfig | None:
    """An MTP layer that neither side announces is not demanded."""
    raw = dict(evidence.corrected or evidence.raw)
    if evidence.source is not None and evidence.source.raw:
        mtp = raw.get(MTP_KEY)
        raw = dict(evidence.source.raw)
        if isinstance(mtp, int) and not rules & {"M01", "M02", "M10"}:
            raw[MTP_KEY] = mtp
    if without_mtp:
        raw[MTP_KEY] = 0
    try:
        return from_dict(raw)
    except ConfigError:
        return evidence.config


def _packed_layers(evidence: Evidence, copies: Copies) -> set[int]:
    """Layers with packed experts; a decoder layer that lost all of them was one if others are."""
    packed, config = evidence.quantized_layers(), copies.config
    if config is None or not packed:
        return packed
    packed |= {
        layer
        for layer in range(config.num_hidden_layers)
        if config.is_sparse(layer) and layer not in evidence.by_layer
    }
    return {layer for layer in packed if layer < config.num_hidden_layers or not copies.plain_mtp}


# ---- own tensors


def _keep_own(evidence: Evidence, findings: Sequence[Finding], copies: Copies) -> None:
    assert isinstance(evidence.files, LocalFiles)
    named = {place for one in findings if one.rule in DROPPED for place in one.places}
    indexed = set((evidence.index or {}).values())
    for name, info in _unfused(evidence.tensors).items():
        parsed = find(name)
        is_stray = parsed is None and bool(indexed) and info.file not in indexed
        is_useless = name.endswith(FP8_SCALE) and not _is_fp8(evidence, name)
        if name in named or is_stray or is_useless or _is_unwanted_mtp(parsed, copies):
            copies.dropped.append(name)
            continue
        out = OutTensor(name, info.dtype, info.shape)
        copies.outputs[name] = Output(out, Copy(evidence.files, info))


def _unfused(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """BF16 experts one by one, whatever else there is."""
    known = {name: info for name, info in tensors.items() if find(name) is not None}
    try:
        split = split_fused(known)
    except CheckpointError:  # fused in another shape, or there twice
        return dict(tensors)
    return split | {name: info for name, info in tensors.items() if name not in known}


def _is_fp8(evidence: Evidence, scale: str) -> bool:
    """Whether an FP8 scale still has a weight of that form."""
    weight = evidence.tensors.get(scale.removesuffix(FP8_SCALE))
    return weight is not None and weight.dtype.startswith("F8")


def _is_unwanted_mtp(parsed: TensorName | None, copies: Copies) -> bool:
    if parsed is None or parsed.layer is None or copies.config is None:
        return False
    if parsed.layer < copies.config.num_hidden_layers:
        return False
    return copies.without_mtp or (copies.plain_mtp and parsed.part is not None)


# ---- from the source


def _originals(evidence: Evidence) -> Mapping[str, TensorInfo]:
    return _unfused(evidence.source.tensors) if evidence.source is not None else {}


def _take(evidence: Evidence, name: str, info: TensorInfo, copies: Copies) -> None:
    """Copy a tensor of the source, and leave out the scales that ours had."""
    assert evidence.source is not None
    assert isinstance(evidence.source.files, LocalFiles)
    copy = Copy(evidence.source.files, info)
    copies.outputs[name] = Output(OutTensor(name, info.dtype, info.shape), copy)
    copies.from_source.add(name)
    if name.endswith("weight"):
        stem = name.removesuffix("weight")
        for scale in (*(stem + scale for scale in SCALES), name + FP8_SCALE):
            if copies.outputs.pop(scale, None) is not None:
                copies.dropped.append(scale)


def _is_packed(name: str, copies: Copies) -> bool:
    parsed = find(name)
    return (
        parsed is not None
        and parsed.role == Role.ROUTED_EXPERT
        and parsed.layer in copies.packed_layers
    )


def _take_missing(evidence: Evidence, originals: Mapping[str, TensorInfo], copies: Copies) -> None:
    for name in expected_tensors(copies.config) if copies.config is not None else ():
        if _is_packed(name, copies) or name in copies.outputs:
            continue
        if name in originals:
            _take(evidence, name, originals[name], copies)
        else:
            copies.missing.append(name)


def _take_named(
    evidence: Evidence,
    findings: Sequence[Finding],
    originals: Mapping[str, TensorInfo],
    copies: Copies,
) -> None:
    named = [place for one in findings if one.rule in COPIED for place in one.places]
    named += [name.removesuffix(FP8_SCALE) for name in copies.outputs if name.endswith(FP8_SCALE)]
    for place in named:
        if place in originals and place not in copies.from_source and not _is_packed(place, copies):
            _take(evidence, place, originals[place], copies)
