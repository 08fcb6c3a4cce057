"""Rules S on scalars: every expert's weight_scale_2, and scales that should not be there.

vLLM and SGLang take the gate's weight_scale_2 for both gate and up (vllm 0.33.0
modelopt.py:1055-1063; sglang 0.5.23 modelopt_quant.py:2744-2757). Thresholds of the warnings are
ratios that fourge's and nvidia-modelopt's own checkpoints stay far below.
Block scales: blocks.py; input_scale: activations.py. Imports no torch.
"""

import math
import statistics
import struct
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from fourge.checkpoint.header import TensorInfo
from fourge.checkpoint.names import PROJECTIONS
from fourge.doctor.evidence import Evidence, Projection
from fourge.doctor.files import read_tensors
from fourge.doctor.findings import Finding, found

SMALLEST_NORMAL = 2.0**-126
PAIR_TOLERANCE = 1e-5
LARGE_SCALE_2 = 1000.0  # weight_scale_2 over the median of a layer
# The same of weights (block scale times weight_scale_2) that are typical of their projection: a few
# large weights of an expert do not move them, another expert's weight_scale_2 does.
LOUD, QUIET = 8.0, 1 / 64
MOST_WEIGHT = 1000.0  # no model has weights as large
LARGEST_PRODUCT = 6 * 448  # of code and block scale
# Kinds of scales that engines pool.
POOLS = {"gate_up": PROJECTIONS[:2], "down": PROJECTIONS[2:]}
KV_SCALES = (".k_scale", ".v_scale", ".kv_scale")
SCALE_SUFFIXES = (".weight_scale", ".weight_scale_2", ".input_scale")
FOREIGN_SCALES = (".weight_global_scale", ".input_global_scale")


class Scale(NamedTuple):
    """One input_scale or weight_scale_2."""

    projection: Projection
    tensor: str
    value: float


def is_usable(value: float) -> bool:
    """Whether an engine can multiply and divide by a scale: positive, finite, not subnormal."""
    return math.isfinite(value) and value >= SMALLEST_NORMAL


def expert_place(projection: Projection) -> str:
    """``model.layers.3.mlp.experts.17``."""
    return projection.tensor().rsplit(".", 2)[0]


def pool_of(name: str) -> str:
    """The pool of a projection."""
    return next(pool for pool, names in POOLS.items() if name in names)


def check_scalars(
    evidence: Evidence, told: Collection[str], typical: Mapping[str, float]
) -> Iterator[Finding]:
    """S03, S04, S05, S11, S12, S13 and Q16. ``told``: weight_scale_2 that S01 names;
    ``typical``: the median block scale by weight_scale_2, of those that were read.
    """
    yield from _weight_scales(evidence, told)
    unequal = unequal_pairs(evidence, "weight_scale_2", PAIR_TOLERANCE)
    yield from _gated_pairs(evidence, unequal)
    yield from _scale_2_outliers(evidence, unequal, typical)
    yield from _other_schemes(evidence)
    yield from _needless_scales(evidence)
    yield from _kv_scales(evidence)


def pools_of(evidence: Evidence, part: str) -> dict[tuple[int, str], list[Scale]]:
    """(layer, pool) -> the scales that are there, in the order of experts."""
    pools: dict[tuple[int, str], list[Scale]] = {}
    for layer, experts in evidence.by_layer.items():
        for pool, names in POOLS.items():
            scales = [
                Scale(own[name], own[name].tensor(part), value)
                for own in experts.values()
                for name in names
                if name in own and (value := evidence.scalar(own[name], part)) is not None
            ]
            if scales:
                pools[layer, pool] = scales
    return pools


# ---- weight_scale_2


def _weight_scales(evidence: Evidence, told: Collection[str]) -> Iterator[Finding]:
    bad = [
        scale
        for scales in pools_of(evidence, "weight_scale_2").values()
        for scale in scales
        if not is_usable(scale.value) and scale.tensor not in told
    ]
    if bad:
        yield found("S03", [scale.tensor for scale in bad], describe_unusable(bad))


def describe_unusable(scales: list[Scale]) -> str:
    kinds = Counter(f"{scale.value:g}" for scale in scales)
    told = ", ".join(f"{value} {count:,} times" for value, count in kinds.most_common(4))
    return f"unusable scales: {told}."


def unequal_pairs(
    evidence: Evidence, part: str, tolerance: float
) -> dict[str, tuple[float, float]]:
    """Experts whose gate and up have different usable scales, with both."""
    unequal = {}
    for experts in evidence.by_layer.values():
        for own in experts.values():
            values = [evidence.scalar(own[name], part) for name in PROJECTIONS[:2] if name in own]
            usable = [value for value in values if value is not None and is_usable(value)]
            if len(usable) == 2 and abs(usable[0] - usable[1]) > tolerance * max(usable):
                unequal[expert_place(own["gate_proj"])] = (usable[0], usable[1])
    return unequal


def _gated_pairs(
    evidence: Evidence, unequal: Mapping[str, tuple[float, float]]
) -> Iterator[Finding]:
    if not unequal:
        return
    packed = [one for one in evidence.experts.values() if one.is_packed]
    pairs = len({(one.layer, one.expert) for one in packed})
    ratios = {place: up / gate for place, (gate, up) in unequal.items()}
    worst = max(ratios, key=lambda place: abs(math.log(ratios[place])))
    message = (
        f"gate and up of {len(unequal):,} of {pairs:,} experts have different weight_scale_2;"
        f" with the gate's for both, up of {worst} is wrong by a factor of {1 / ratios[worst]:.4g}."
    )
    yield found("S04", unequal, message)


def _scale_2_outliers(
    evidence: Evidence, unequal: Mapping[str, object], typical: Mapping[str, float]
) -> Iterator[Finding]:
    """S05."""
    pools = pools_of(evidence, "weight_scale_2").values()
    usable = [[scale for scale in scales if is_usable(scale.value)] for scales in pools]
    every = [scale for scales in usable for scale in scales]
    if every and LARGEST_PRODUCT * statistics.median(one.value for one in every) > MOST_WEIGHT:
        largest = LARGEST_PRODUCT * max(one.value for one in every)
        message = (
            f"weights up to {largest:.3g} would follow: is it stored as its reciprocal, as"
            " compressed-tensors does?"
        )
        yield found("S05", [one.tensor for one in every], message, severity="error")
        return
    outliers: dict[str, float] = {}
    for scales in usable:
        outliers |= {
            name: ratio
            for name, ratio in _ratios({one.tensor: one.value for one in scales}).items()
            if ratio > LARGE_SCALE_2
        }
        for kind in PROJECTIONS:
            weights = {
                one.tensor: one.value * typical[one.tensor]
                for one in scales
                if one.projection.name == kind and typical.get(one.tensor)
            }
            outliers |= {
                name: ratio
                for name, ratio in _ratios(weights).items()
                if not QUIET <= ratio <= LOUD
            }
    places = {one.tensor: expert_place(one.projection) for one in every}
    outliers = {name: ratio for name, ratio in outliers.items() if places[name] not in unequal}
    if outliers:
        worst = max(outliers, key=lambda name: abs(math.log(outliers[name])))
        message = (
            f"by {worst} and its block scales, weights are {outliers[worst]:.3g} times those of"
            " the other experts of the layer."
        )
        yield found("S05", outliers, message)


def _ratios(values: Mapping[str, float]) -> dict[str, float]:
    """Each value over the median of all."""
    median = statistics.median(values.values()) if values else 1.0
    return {name: value / median for name, value in values.items()}


# ---- scales that should not be there, and other schemes


def _needless_scales(evidence: Evidence) -> Iterator[Finding]:
    """Scales of modules whose weight is not quantized."""
    needless = []
    for name in evidence.tensors:
        for suffix in SCALE_SUFFIXES:
            if name.endswith(suffix):
                weight = evidence.tensors.get(name.removesuffix(suffix) + ".weight")
                if weight is not None and weight.dtype in ("BF16", "F16", "F32"):
                    needless.append(name)
    if needless:
        yield found("S11", needless, f"{len(needless):,} scales belong to unquantized weights.")


def _other_schemes(evidence: Evidence) -> Iterator[Finding]:
    smooth = [name for name in evidence.tensors if name.endswith(".pre_quant_scale")]
    algorithms = {
        "config.json: quantization_config": evidence.quantization.get("quant_algo"),
        "hf_quant_config.json: quantization": evidence.nested.get("quant_algo"),
    }
    smooth += [place for place, name in algorithms.items() if name == "NVFP4_AWQ"]
    if smooth:
        yield found("S12", smooth, "weights are pre-scaled (AWQ); vLLM does not read this form.")
    foreign = [
        info
        for name, info in evidence.tensors.items()
        if name.endswith(FOREIGN_SCALES) and info.dtype == "F32" and info.nbytes == 4
    ]
    values = _read_scalars(evidence, foreign)
    bad = {name: value for name, value in values.items() if not is_usable(value)}
    bad |= {name: value for name, value in values.items() if is_usable(value) and value > 1e38}
    packed = [name for name in evidence.tensors if name.endswith(".weight_packed")]
    if bad:
        told = ", ".join(f"{value:.3g}" for value in list(bad.values())[:4])
        yield found(
            "S13", bad, f"{len(bad):,} of {len(values):,} global scales are unusable: {told}."
        )
    elif packed and str(evidence.quantization.get("quant_method", "modelopt")).startswith(
        "modelopt"
    ):
        message = "weights are named as compressed-tensors does, the metadata say modelopt."
        yield found("S13", packed, message)


def _read_scalars(evidence: Evidence, infos: list[TensorInfo]) -> dict[str, float]:
    return {
        info.name: struct.unpack("<f", data)[0]
        for info, data in read_tensors(evidence.files, infos)
        if len(data) == 4
    }


def _kv_scales(evidence: Evidence) -> Iterator[Finding]:
    scales = [
        info
        for name, info in evidence.tensors.items()
        if name.endswith(KV_SCALES) and info.dtype == "F32" and info.nbytes == 4
    ]
    bad = {
        name: value
        for name, value in _read_scalars(evidence, scales).items()
        if not is_usable(value)
    }
    if bad:
        told = ", ".join(f"{value:g}" for value in list(bad.values())[:4])
        yield found("Q16", bad, f"scales of the KV cache are {told}.")
