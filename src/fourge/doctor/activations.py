"""Rules A: every expert's input_scale, as engines merge them.

Most kernels take the largest of a layer, so that one expert can spoil it (vllm 0.33.0
flashinfer_fp4_moe.py:386-397; sglang 0.5.23 modelopt_quant.py:2768-2810). Thresholds of the
warnings are ratios that fourge's and nvidia-modelopt's own checkpoints stay far below.
Imports no torch.
"""

import itertools
import statistics
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from fourge.doctor.evidence import Evidence
from fourge.doctor.findings import Finding, found
from fourge.doctor.scales import (
    LARGEST_PRODUCT,
    POOLS,
    Scale,
    describe_unusable,
    expert_place,
    is_usable,
    pool_of,
    pools_of,
    unequal_pairs,
)

# What tools write for an expert that saw no token, as float32: 0.5/2688, 6/2688, 1.
FALLBACKS = tuple(struct.unpack("<f", struct.pack("<f", x))[0] for x in (0.5 / 2688, 6 / 2688, 1))
# A value shared by this part of a layer's experts, and so much oftener than any other, is no
# measurement.
FALLBACK_SHARE, FALLBACK_LEAD, POLICY_SHARE = 0.05, 3, 0.75
OUTLIER = 50.0  # largest input_scale of a layer over the median
WIDE = 16.0  # the same; not yet harmful
MOST_INPUT = 2e5  # beyond what activations of a model reach, extreme ones too
RESOLUTION = 6 * 2.0**-9  # smallest block amax that survives, per input_scale


def input_scale_figures(evidence: Evidence) -> list[dict[str, Any]]:
    """Per layer and pool: the scale that most kernels will use, and the floor it sets (A07)."""
    rows = []
    for (layer, pool), scales in pools_of(evidence, "input_scale").items():
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


def check_input_scales(evidence: Evidence) -> Iterator[Finding]:
    """A01 to A06, A08, A09 and A11."""
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
    pools = pools_of(evidence, "input_scale")
    bad = [one for scales in pools.values() for one in scales if not is_usable(one.value)]
    if bad:
        yield found("A02", [scale.tensor for scale in bad], describe_unusable(bad))
    yield from _implausible(pools)
    unequal = unequal_pairs(evidence, "input_scale", 0.0)
    yield from _unequal_inputs(unequal)
    yield from _distributions(pools, unequal)


def _implausible(pools: Mapping[tuple[int, str], list[Scale]]) -> Iterator[Finding]:
    """A02: whole layers with scales of inputs that no model has."""
    large = [
        scale
        for scales in pools.values()
        if LARGEST_PRODUCT * statistics.median(scale.value for scale in scales) > MOST_INPUT
        for scale in scales
    ]
    if large:
        most = LARGEST_PRODUCT * max(scale.value for scale in large)
        message = (
            f"inputs up to {most:.3g} would follow: is it stored as its reciprocal, as"
            " compressed-tensors does?"
        )
        yield found("A02", [scale.tensor for scale in large], message)


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
    constant = {key for key, scales in usable.items() if {one.value for one in scales} == {1.0}}
    if constant:
        places = list(dict.fromkeys(f"model.layers.{layer}.mlp.experts" for layer, _ in constant))
        number = f"in {len(places)} layers " if len(constant) < len(usable) else ""
        message = (
            f"{number}every input_scale is 1: blocks of inputs below {RESOLUTION:.3g} become zeros."
        )
        yield found("A06", sorted(places), message)
    usable = {key: scales for key, scales in usable.items() if key not in constant}
    ones, filled, outliers, wide = [], _uncalibrated(usable), [], []
    for scales in usable.values():
        others = [scale.value for scale in scales if scale.value != 1.0]
        if others and len(others) < len(scales) and WIDE * statistics.median(others) < 1.0:
            ones += [scale for scale in scales if scale.value == 1.0]
            scales = [scale for scale in scales if scale.value != 1.0]
        filled += [scale for scale in _filled(scales) if scale not in filled]
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
        message = f"{len(filled):,} projections have a filled-in value, no measurement ({told})."
        yield found("A04", [scale.tensor for scale in filled], message)
    for rule, ratios in (("A05", outliers), ("A11", wide)):
        if ratios:
            worst, ratio = max(ratios, key=lambda one: one[1])
            message = f"{worst.tensor} is {ratio:.3g} times the median of its layer."
            yield found(rule, [scale.tensor for scale, _ in ratios], message)


def _is_sound(scale: Scale, unequal: Mapping[str, object]) -> bool:
    return is_usable(scale.value) and expert_place(scale.projection) not in unequal


def _uncalibrated(pools: Mapping[tuple[int, str], list[Scale]]) -> list[Scale]:
    """Scales of experts with the same fallback of a tool for both their inputs. One alone may have
    been measured: amax 6 or 0.5.
    """
    experts: dict[tuple[int, int], list[Scale]] = {}
    for scale in itertools.chain.from_iterable(pools.values()):
        experts.setdefault((scale.projection.layer, scale.projection.expert), []).append(scale)
    return [
        scale
        for own in experts.values()
        if len({pool_of(one.projection.name) for one in own}) == len(POOLS)
        and len({one.value for one in own}) == 1
        and own[0].value in FALLBACKS[:2]
        for scale in own
    ]


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
