"""Rules S and A on scalars: every expert's weight_scale_2 and input_scale, as engines merge them.

vLLM and SGLang take the gate's weight_scale_2 for both gate and up, and most of their kernels the
largest input_scale of a layer (vllm 0.33.0 modelopt.py:1055-1063, flashinfer_fp4_moe.py:386-397;
sglang 0.5.23 modelopt_quant.py:2744-2810), so that one expert can spoil a layer. Thresholds of the
warnings are ratios that fourge's and nvidia-modelopt's own checkpoints stay far below.
Block scales: blocks.py. Imports no torch.
"""

import math
import statistics
import struct
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from fourge.checkpoint.names import PROJECTIONS
from fourge.doctor.evidence import Evidence, Projection
from fourge.doctor.files import read_tensors
from fourge.doctor.findings import Finding, found

SMALLEST_NORMAL = 2.0**-126
PAIR_TOLERANCE = 1e-5
# What tools write for an expert that saw no token, as float32: 0.5/2688, 6/2688, 1.
FALLBACKS = tuple(struct.unpack("<f", struct.pack("<f", x))[0] for x in (0.5 / 2688, 6 / 2688, 1))
# A value shared by this part of a layer's experts, and so much oftener than any other, is no
# measurement.
FALLBACK_SHARE, FALLBACK_LEAD, POLICY_SHARE = 0.05, 3, 0.75
OUTLIER = 50.0  # largest input_scale of a layer over the median
WIDE = 16.0  # the same; not yet harmful
LARGE_SCALE_2 = 1000.0  # weight_scale_2 over the median of a layer
RESOLUTION = 6 * 2.0**-9  # smallest block amax that survives, per input_scale
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


def check_scalars(evidence: Evidence, told: Collection[str] = ()) -> Iterator[Finding]:
    """S03, S04, S05, S11, S12, S13, all of A, and Q16. ``told``: weight_scale_2 that S01 names."""
    yield from _weight_scales(evidence, told)
    unequal = _unequal(evidence, "weight_scale_2", PAIR_TOLERANCE)
    yield from _gated_pairs(evidence, unequal)
    yield from _scale_2_outliers(evidence, unequal)
    yield from _other_schemes(evidence)
    yield from _needless_scales(evidence)
    yield from _input_scales(evidence)
    yield from _kv_scales(evidence)


def input_scale_figures(evidence: Evidence) -> list[dict[str, Any]]:
    """Per layer and pool: the scale that most kernels will use, and the floor it sets (A07)."""
    rows = []
    for (layer, pool), scales in _pools(evidence, "input_scale").items():
        values = [scale.value for scale in scales if is_usable(scale.value)]
        if values:
            rows.append(
                {
                    "layer": layer,
                    "projections": pool,
                    "largest": max(values),
                    "median": statistics.median(values),
                    "smallest": min(values),
                    "floor": RESOLUTION * max(values),
                }
            )
    return rows


def _pools(evidence: Evidence, part: str) -> dict[tuple[int, str], list[Scale]]:
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
        for scales in _pools(evidence, "weight_scale_2").values()
        for scale in scales
        if not is_usable(scale.value) and scale.tensor not in told
    ]
    if bad:
        yield found("S03", [scale.tensor for scale in bad], _unusable(bad))


def _unusable(scales: list[Scale]) -> str:
    kinds = Counter(f"{scale.value:g}" for scale in scales)
    told = ", ".join(f"{value} {count:,} times" for value, count in kinds.most_common(4))
    return f"unusable scales: {told}."


def _unequal(evidence: Evidence, part: str, tolerance: float) -> dict[str, tuple[float, float]]:
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


def _scale_2_outliers(evidence: Evidence, unequal: Mapping[str, object]) -> Iterator[Finding]:
    outliers: dict[str, float] = {}
    for scales in _pools(evidence, "weight_scale_2").values():
        usable = [scale for scale in scales if is_usable(scale.value)]
        median = statistics.median(scale.value for scale in usable) if usable else 0.0
        outliers |= {
            scale.tensor: scale.value / median
            for scale in usable
            if scale.value > LARGE_SCALE_2 * median
            and expert_place(scale.projection) not in unequal
        }
    if outliers:
        worst = max(outliers, key=lambda name: outliers[name])
        message = f"{worst} is {outliers[worst]:.3g} times the median of its layer."
        yield found("S05", outliers, message)


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


def _read_scalars(evidence: Evidence, infos: list[Any]) -> dict[str, float]:
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


# ---- input_scale


def is_weight_only(evidence: Evidence) -> bool:
    """Whether the metadata say that activations are not quantized."""
    blocks = (evidence.quantization, evidence.nested)
    if any(str(block.get("quant_algo")).upper() == "W4A16_NVFP4" for block in blocks):
        return True
    groups = evidence.quantization.get("config_groups")
    return (
        isinstance(groups, dict)
        and bool(groups)
        and all(
            isinstance(group, dict) and group.get("input_activations") is None
            for group in groups.values()
        )
    )


def _input_scales(evidence: Evidence) -> Iterator[Finding]:
    packed = [one for one in evidence.experts.values() if one.is_packed]
    absent = [
        one.tensor("input_scale")
        for one in packed
        if "input_scale" not in one.parts and one.tensor("input_scale") not in evidence.lost
    ]
    if absent and len(absent) == len(packed):
        if not is_weight_only(evidence):
            message = (
                "no expert has an input_scale, and the metadata declare quantized activations."
            )
            yield found("A09", ["config.json: quantization_config"], message)
        return
    if absent:
        message = f"{len(absent):,} of {len(packed):,} projections have no input_scale."
        yield found("A01", absent, message)
    pools = _pools(evidence, "input_scale")
    bad = [one for scales in pools.values() for one in scales if not is_usable(one.value)]
    if bad:
        yield found("A02", [scale.tensor for scale in bad], _unusable(bad))
    unequal = _unequal(evidence, "input_scale", 0.0)
    yield from _unequal_inputs(unequal)
    yield from _distributions(pools, unequal)


def _unequal_inputs(unequal: Mapping[str, tuple[float, float]]) -> Iterator[Finding]:
    if unequal:
        place, (gate, up) = next(iter(unequal.items()))
        message = (
            f"gate and up of {len(unequal):,} experts have different input_scale, though they see"
            f" the same input: {gate:g} and {up:g} in {place}."
        )
        yield found("A03", unequal, message)


def _distributions(
    pools: Mapping[tuple[int, str], list[Scale]], unequal: Mapping[str, object]
) -> Iterator[Finding]:
    """A04, A05, A06, A08, A11: values that are no measurements, and layers that one expert sets.
    Experts that A02 or A03 names are left out.
    """
    usable = {
        key: kept
        for key, scales in pools.items()
        if (kept := [one for one in scales if _is_sound(one, unequal)])
    }
    values = {scale.value for scales in usable.values() for scale in scales}
    if values == {1.0}:
        places = [f"model.layers.{layer}.mlp.experts" for layer, _ in usable]
        message = f"every input_scale is 1: blocks of inputs below {RESOLUTION:.3g} become zeros."
        yield found("A06", list(dict.fromkeys(places)), message)
        return
    ones, filled, outliers, wide = [], [], [], []
    for scales in usable.values():
        others = [scale.value for scale in scales if scale.value != 1.0]
        if others and len(others) < len(scales) and WIDE * statistics.median(others) < 1.0:
            ones += [scale for scale in scales if scale.value == 1.0]
            scales = [scale for scale in scales if scale.value != 1.0]
        filled += _filled(scales)
        median = statistics.median(scale.value for scale in scales)
        largest = max(scales, key=lambda scale: scale.value)
        if largest.value > OUTLIER * median:
            outliers.append((largest, largest.value / median))
        elif largest.value > WIDE * median:
            wide.append((largest, largest.value / median))
    if ones:
        message = (
            f"{len(ones):,} input_scale are exactly 1, far above their layer: no measurement; the"
            " largest of a layer sets the resolution of all."
        )
        yield found("A08", [scale.tensor for scale in ones], message)
    if filled:
        told = ", ".join(f"{value:.6g}" for value in sorted({one.value for one in filled})[:4])
        message = f"{len(filled):,} projections share one filled-in value of their layer ({told})."
        yield found("A04", [scale.tensor for scale in filled], message)
    for rule, ratios in (("A05", outliers), ("A11", wide)):
        if ratios:
            worst, ratio = max(ratios, key=lambda one: one[1])
            message = f"{worst.tensor} is {ratio:.3g} times the median of its layer."
            yield found(rule, [scale.tensor for scale, _ in ratios], message)


def _is_sound(scale: Scale, unequal: Mapping[str, object]) -> bool:
    return is_usable(scale.value) and expert_place(scale.projection) not in unequal


def _filled(scales: list[Scale]) -> list[Scale]:
    """Scales that hold the layer's largest value, or a tool's fallback, too often to be measured.

    One value for all, or nearly all, experts is a policy: engines use the largest anyway.
    """
    counts = Counter({scale.projection.expert: scale.value for scale in scales}.values())
    if len(counts) < 2:
        return []
    (value, count), (_, second) = counts.most_common(2)
    many = count >= max(2, FALLBACK_SHARE * counts.total()) and count >= FALLBACK_LEAD * second
    shared = count > POLICY_SHARE * counts.total()
    if not many or not (value in FALLBACKS or (value == max(counts) and not shared)):
        return []
    return [scale for scale in scales if scale.value == value]
