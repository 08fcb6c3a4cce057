"""What happened to a projection that is far from its source: hypotheses, tried one by one.

Each one undoes a known accident; it is true if the weights then agree with the source. Whole
projections are compared, but other experts only by their first rows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fourge.checkpoint.names import PROJECTIONS
from fourge.doctor.comparison import (
    FACTOR_TOLERANCE,
    LOW_COSINE,
    ROWS,
    Comparison,
    Weights,
    errs_as_max,
)
from fourge.doctor.evidence import Projection
from fourge.doctor.findings import Finding, found
from fourge.doctor.passes import Progress, load_bytes
from fourge.formats import kernels
from fourge.formats.layout import BLOCK_SIZE
from fourge.formats.nvfp4 import NVFP4Tensor

# Tiles of the layout that kernels want: (M/128, K/4, 32, 4, 4), vllm 0.33.0 nvfp4_utils.py:13-50.
TILE_ROWS, TILE_COLUMNS = 128, 4
NIBBLES, SWIZZLED, FACTOR = "nibbles", "swizzled", "factor"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is wrong with a projection: the rule, a word for the repair, a clause for people."""

    projection: Projection
    rule: str
    cause: str
    told: str
    factor: float = 1.0


class Suspect(NamedTuple):
    """A projection with everything that hypotheses need."""

    weights: Weights
    projection: Projection
    w: Tensor
    q: NVFP4Tensor


def diagnose(
    weights: Weights, comparisons: Sequence[Comparison], on_progress: Progress
) -> list[Diagnosis]:
    """Look at suspicious projections again; one that errs as its arithmetic must is left out."""
    result = []
    total = sum(one.projection.parts["weight"].nbytes for one in comparisons)
    done = 0
    for one in comparisons:
        w, q = weights.original(one.projection), weights.packed(one.projection)
        done += one.projection.parts["weight"].nbytes
        on_progress("suspicious projections", done, total)
        if errs_as_max(w, q, one.amax):
            continue
        result.append(_name(Suspect(weights, one.projection, w, q), one))
    return result


def check_diagnoses(diagnoses: Sequence[Diagnosis]) -> Iterator[Finding]:
    """One finding per rule and cause."""
    causes: dict[tuple[str, str], list[Diagnosis]] = {}
    for one in diagnoses:
        causes.setdefault((one.rule, one.cause), []).append(one)
    for (rule, _), own in causes.items():
        places = [one.projection.tensor() for one in own]
        yield found(rule, places, f"{places[0]} {own[0].told}.")


def _name(suspect: Suspect, comparison: Comparison) -> Diagnosis:
    projection = suspect.projection
    factor = comparison.factor
    if comparison.cosine >= LOW_COSINE and abs(factor - 1) > FACTOR_TOLERANCE:
        kind = "small" if factor > 1 else "large"
        told = f"is too {kind}: weight_scale_2 times {factor:.4g} fits"
        return Diagnosis(projection, "S07", FACTOR, told, factor)
    if comparison.cosine >= LOW_COSINE:
        told = f"has a relative RMS of {comparison.relative_rms:.3f}, more than its kind"
        return Diagnosis(projection, "V02", "far", told)
    if comparison.cosine < -LOW_COSINE:
        return Diagnosis(projection, "V01", "sign", "has the signs inverted")
    for hypothesis in HYPOTHESES:
        named = hypothesis(suspect)
        if named is not None:
            return named
    if comparison.cosine > 0.9:
        told = f"is damaged in part: cosine {comparison.cosine:.3f} with the source"
    else:
        told = f"does not hold the source's weights: cosine {comparison.cosine:.3f}"
    return Diagnosis(projection, "V01", "other", told)


def cosine(w: Tensor, q: NVFP4Tensor) -> float:
    """Cosine of a weight and a packed one; 0 where either is zero or not finite."""
    sums = kernels.compare(w, q)
    norm = math.sqrt(sums.square) * math.sqrt(abs(sums.quantized_square))
    return sums.product / norm if norm > 0 and math.isfinite(norm) else 0.0


def swap_nibbles(q: NVFP4Tensor) -> NVFP4Tensor:
    """Even and odd columns exchanged."""
    return q._replace(weight=q.weight << 4 | q.weight >> 4)


def unswizzle(scale: Tensor) -> Tensor | None:
    """Block scales [M, K/16] in row order, from the tiles of 128 x 4 in which kernels want them.

    None if the shape does not divide into tiles.
    """
    rows, columns = scale.shape
    if rows % TILE_ROWS or columns % TILE_COLUMNS:
        return None
    tiles = scale.reshape(rows // TILE_ROWS, columns // TILE_COLUMNS, 32, 4, TILE_COLUMNS)
    # Row 32 j + i of a tile lies at [i, j].
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns).contiguous()


def _nibbles(suspect: Suspect) -> Diagnosis | None:
    if cosine(suspect.w, swap_nibbles(suspect.q)) < LOW_COSINE:
        return None
    told = "has the two codes of every byte exchanged"
    return Diagnosis(suspect.projection, "V01", NIBBLES, told)


def _swizzled(suspect: Suspect) -> Diagnosis | None:
    scale = unswizzle(suspect.q.weight_scale.view(torch.uint8))
    if scale is None:
        return None
    linear = suspect.q._replace(weight_scale=scale.view(torch.float8_e4m3fn))
    if cosine(suspect.w, linear) < LOW_COSINE:
        return None
    told = "has block scales in the order of a kernel (128 x 4 tiles)"
    return Diagnosis(suspect.projection, "S08", SWIZZLED, told)


def _exchanged(suspect: Suspect) -> Diagnosis | None:
    """Gate for up, or up for gate: of the same expert."""
    own = suspect.projection
    partners = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    if own.name not in partners:
        return None
    other = suspect.weights.original_of(own.layer, own.expert, partners[own.name])
    if other is None or other.shape != suspect.w.shape:
        return None
    if cosine(other, suspect.q) < LOW_COSINE:
        return None
    return Diagnosis(own, "V01", "exchanged", f"holds {partners[own.name]} of the same expert")


def _transposed(suspect: Suspect) -> Diagnosis | None:
    """Packed along the other dimension: the bytes are those of the transposed weight."""
    num_rows, num_columns = suspect.w.shape
    if num_rows % BLOCK_SIZE:
        return None
    q = NVFP4Tensor(
        suspect.q.weight.reshape(num_columns, num_rows // 2),
        suspect.q.weight_scale.reshape(num_columns, num_rows // BLOCK_SIZE),
        suspect.q.weight_scale_2,
    )
    if cosine(suspect.w.T.contiguous(), q) < LOW_COSINE:
        return None
    told = "was packed along the other dimension"
    return Diagnosis(suspect.projection, "V01", "transposed", told)


def _other_expert(suspect: Suspect) -> Diagnosis | None:
    """Another expert's weights under this name, of any projection of the same shape."""
    own, head = suspect.projection, _head(suspect.q)
    for expert, name in _neighbours(suspect):
        w = suspect.weights.first_rows(own.layer, expert, name, suspect.w.shape)
        if w is not None and cosine(w, head) >= LOW_COSINE:
            told = f"holds {name} of expert {expert}"
            return Diagnosis(own, "V01", "other expert", told)
    return None


def _other_scales(suspect: Suspect) -> Diagnosis | None:
    """Block scales of another expert."""
    own, head = suspect.projection, _head(suspect.q)
    w = suspect.w[: len(head.weight)]
    for expert, name in _neighbours(suspect):
        other = suspect.weights.evidence.by_layer[own.layer].get(expert, {}).get(name)
        info = other.parts.get("weight_scale") if other is not None else None
        if info is None or info.shape != suspect.q.weight_scale.shape:
            continue
        data = load_bytes(suspect.weights.evidence.files, info, 0, head.weight_scale.numel())
        scale = data.view(torch.float8_e4m3fn).view(head.weight_scale.shape)
        if cosine(w, head._replace(weight_scale=scale)) >= LOW_COSINE:
            told = f"has the block scales of {name} of expert {expert}"
            return Diagnosis(own, "V01", "other scales", told)
    return None


def _neighbours(suspect: Suspect) -> Iterator[tuple[int, str]]:
    """(expert, projection) of everything else in the layer, the same projection first."""
    own = suspect.projection
    experts = suspect.weights.evidence.by_layer[own.layer]
    for name in (own.name, *(name for name in PROJECTIONS if name != own.name)):
        for expert in experts:
            if (expert, name) != (own.expert, own.name):
                yield expert, name


def _head(q: NVFP4Tensor) -> NVFP4Tensor:
    return NVFP4Tensor(q.weight[:ROWS], q.weight_scale[:ROWS], q.weight_scale_2)


HYPOTHESES: tuple[Callable[[Suspect], Diagnosis | None], ...] = (
    _nibbles, _swizzled, _exchanged, _other_expert, _transposed, _other_scales,
)  # fmt: skip
