"""Rules S07, S08, V01 to V05: dequantized experts against the weights of the source.

One pass reads every packed projection and its source: error sums, and the bits that nvidia-modelopt
"max" would have written with the same amax. What is far off is read again and named by trying what
could have happened to it (suspects.py). What the arithmetic itself loses (of a gate a million times
smaller than its up) is no damage.
With e the sum of squared errors: relative RMS = sqrt(e / sum w^2), for NVFP4 about 0.095 on
normally distributed weights. Peak memory: one expert, packed, in BF16 and packed again, per thread.
"""

import math
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fourge.checkpoint.header import TensorInfo
from fourge.checkpoint.names import expert_name, find, split_fused
from fourge.doctor.evidence import Evidence, Projection
from fourge.doctor.files import Files
from fourge.doctor.findings import Finding, found
from fourge.doctor.passes import Progress, in_parallel, load, load_bytes, num_workers
from fourge.doctor.scales import POOLS, is_usable
from fourge.formats import kernels, nvfp4
from fourge.formats.layout import BLOCK_SIZE, packed_shape, scale_shape
from fourge.formats.nvfp4 import ErrorSums, NVFP4Tensor
from fourge.models.chunks import slices

# A projection is looked at again below this cosine, with a best factor farther from 1 than this,
# or with a relative RMS so much larger than the median of its kind.
LOW_COSINE, FACTOR_TOLERANCE, FAR = 0.98, 0.03, 1.25
# Fitted to inputs, weights err most where inputs are least, and how much differs by expert.
FAR_FITTED = 2.0
# Its error is the arithmetic's own if "max" with the same scale would err as much.
OWN_ERROR = 1.1
# Part of a max export's projections that may differ in some bits, and be named for it.
FEW = 0.1
WORST = 10
ROUNDING = 1e-4  # of sums of squares in float32
IN_MEMORY = 8  # bytes per packed byte: BF16 twice over while it is read, packed twice, codes
ROWS = 16  # of another expert, where a few will do


@dataclass(frozen=True, slots=True)
class Comparison:
    """One projection against its source."""

    projection: Projection
    sums: ErrorSums
    amax: float  # of the source's pool: gate and up together, or down
    different_codes: int  # from "max", minus zero counted as zero
    is_max: bool  # same scales and codes as "max"
    farther_blocks: int  # whose squared error is larger than that of "max"

    @property
    def relative_rms(self) -> float:
        """nan where the source is zero."""
        square = self.sums.square
        return math.sqrt(self.sums.error_square / square) if square > 0 else math.nan

    @property
    def cosine(self) -> float:
        norm = math.sqrt(self.sums.square) * math.sqrt(self.sums.quantized_square)
        return self.sums.product / norm if norm > 0 else 0.0

    @property
    def factor(self) -> float:
        """What the dequantized weight should be multiplied with; about 1."""
        quantized = self.sums.quantized_square
        return self.sums.product / quantized if quantized > 0 else math.nan

    @property
    def is_number(self) -> bool:
        return math.isfinite(self.sums.error_square)


class Weights:
    """Reads packed projections and the source's weights for them."""

    def __init__(self, evidence: Evidence, source: Evidence) -> None:
        known = {name: info for name, info in source.tensors.items() if find(name) is not None}
        self.evidence = evidence
        self._files = source.files
        self._originals = split_fused(known)

    def original_info(self, projection: Projection) -> TensorInfo | None:
        """The source's BF16 tensor, or None if there is none that fits."""
        info = self._originals.get(projection.tensor())
        parts = projection.parts
        if info is None or info.dtype != "BF16" or len(info.shape) != 2 or info.shape[-1] % 16:
            return None
        fits = (
            {"weight", "weight_scale", "weight_scale_2"} <= parts.keys()
            and parts["weight"].shape == packed_shape(info.shape)
            and parts["weight_scale"].shape == scale_shape(info.shape)
            and parts["weight_scale"].dtype == "F8_E4M3"
            and parts["weight_scale_2"].dtype == "F32"
            and parts["weight_scale_2"].nbytes == 4
        )
        return info if fits else None

    def has_original(self, projection: Projection) -> bool:
        """Whether the source has a BF16 weight of this projection's shape."""
        info = self._originals.get(projection.tensor())
        return info is not None and info.dtype == "BF16" and len(info.shape) == 2

    def original(self, projection: Projection) -> Tensor:
        """[out, in] BF16 of the source."""
        return load(self._files, self._originals[projection.tensor()])

    def amax(self, layer: int, expert: int, name: str) -> float:
        """Of the source's weight; 0 where it has none."""
        info = self._originals.get(expert_name(layer, expert, name))
        return kernels.amax(load(self._files, info)) if info and info.dtype == "BF16" else 0.0

    def original_of(self, layer: int, expert: int, name: str) -> Tensor | None:
        """The same for any projection, None where the source has none."""
        own = self.evidence.by_layer.get(layer, {}).get(expert, {}).get(name)
        fits = own is not None and self.original_info(own) is not None
        return self.original(own) if own is not None and fits else None

    def first_rows(self, layer: int, expert: int, name: str, shape: Sequence[int]) -> Tensor | None:
        """The first rows of a source's weight; None where there is none of that shape."""
        info = self._originals.get(expert_name(layer, expert, name))
        if info is None or info.dtype != "BF16" or info.shape != tuple(shape):
            return None
        rows = min(ROWS, shape[0])
        count = rows * info.nbytes // shape[0]
        return load_bytes(self._files, info, 0, count).view(torch.bfloat16).view(rows, shape[1])

    def packed(self, projection: Projection) -> NVFP4Tensor:
        """As it lies on disk."""
        return load_packed(self.evidence.files, projection)


def load_packed(files: Files, projection: Projection) -> NVFP4Tensor:
    """A packed projection, whole."""
    parts = projection.parts
    return NVFP4Tensor(
        load_bytes(files, parts["weight"]).view(parts["weight"].shape),
        load(files, parts["weight_scale"]),
        load(files, parts["weight_scale_2"]).reshape(()),
    )


def compare_experts(
    weights: Weights, chosen: Sequence[Sequence[Projection]], *, memory: int | None,
    on_progress: Progress,
) -> list[Comparison]:  # fmt: skip
    """Compare experts, each given by its packed projections."""
    sizes = [sum(one.parts["weight"].nbytes for one in own) for own in chosen]
    workers = num_workers(IN_MEMORY * max(sizes, default=0), memory)
    comparisons, done = [], 0
    expert = partial(_compare_expert, weights)
    for size, own in zip(sizes, in_parallel(expert, chosen, workers), strict=True):
        comparisons += own
        done += size
        on_progress("experts against the source", done, sum(sizes))
    return comparisons


def comparable(weights: Weights, experts: Collection[tuple[int, int]]) -> list[list[Projection]]:
    """The packed projections of experts (layer, number) that the source has too, by expert."""
    result = []
    for layer, number in experts:
        own = weights.evidence.by_layer[layer][number].values()
        packed = [one for one in own if one.is_packed and weights.original_info(one) is not None]
        if packed:
            result.append(packed)
    return result


def _compare_expert(weights: Weights, projections: Sequence[Projection]) -> list[Comparison]:
    originals = {one.name: weights.original(one) for one in projections}
    results = []
    for names in POOLS.values():
        own = [one for one in projections if one.name in names]
        amax = max((kernels.amax(originals[one.name]) for one in own), default=0.0)
        if len(own) == 1 < len(names):  # the other one is not comparable
            amax = max(amax, *(weights.amax(own[0].layer, own[0].expert, name) for name in names))
        for one in own:
            packed = weights.packed(one)
            sums = kernels.compare(originals[one.name], packed)
            results.append(
                Comparison(one, sums, amax, *_against_max(originals[one.name], packed, amax))
            )
    return results


class _AgainstMax(NamedTuple):
    """The last fields of a Comparison."""

    different_codes: int
    is_max: bool
    farther_blocks: int


def _against_max(w: Tensor, q: NVFP4Tensor, amax: float) -> _AgainstMax:
    """What differs from "max" with the pool's amax; minus zero counts as zero."""
    if not math.isfinite(amax):
        return _AgainstMax(0, False, 0)
    wanted = kernels.quantize(w, nvfp4.weight_scale_2(amax))
    scales = torch.equal(wanted.weight_scale.view(torch.uint8), q.weight_scale.view(torch.uint8))
    same_scales = scales and bool(wanted.weight_scale_2 == q.weight_scale_2)
    codes = 0
    if not torch.equal(wanted.weight, q.weight):
        codes = int((unsigned_zeros(wanted.weight) != unsigned_zeros(q.weight)).sum())
    if same_scales and not codes:
        return _AgainstMax(0, True, 0)
    return _AgainstMax(codes, False, _farther_blocks(w, q, wanted))


def _farther_blocks(w: Tensor, q: NVFP4Tensor, other: NVFP4Tensor) -> int:
    """Blocks of 16 in which q is farther from w than ``other`` is, beyond what rounding does."""
    count = 0
    for rows in slices(len(w), ROWS):
        ours_NB, theirs_NB = (
            _block_errors(w[rows], NVFP4Tensor(one.weight[rows], one.weight_scale[rows], one[2]))
            for one in (q, other)
        )
        count += int((ours_NB > theirs_NB * (1 + ROUNDING)).sum())
    return count


def _block_errors(w_NK: Tensor, q: NVFP4Tensor) -> Tensor:
    """Squared error of every block, float32 [N, K / 16]."""
    difference_NK = w_NK.float() - kernels.dequantize(q, torch.float32)
    return difference_NK.square().unflatten(-1, (-1, BLOCK_SIZE)).sum(-1)


def unsigned_zeros(packed: Tensor) -> Tensor:
    """Packed codes [N, K/2] as single codes [N, K], minus zero made zero."""
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
    return codes.masked_fill_(codes == 8, 0)


# ---- figures


def error_figures(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Per layer and projection, and the worst ten."""
    groups: dict[tuple[int, str], list[Comparison]] = {}
    for one in comparisons:
        if one.is_number and one.sums.square > 0:
            groups.setdefault((one.projection.layer, one.projection.name), []).append(one)
    by_layer = [_summary(layer, name, group) for (layer, name), group in sorted(groups.items())]
    every = [one for group in groups.values() for one in group]
    worst = sorted(every, key=lambda one: -one.relative_rms)[:WORST]
    return {
        "weight_error": by_layer,
        "worst_projections": [
            {
                "projection": one.projection.tensor().removesuffix(".weight"),
                "relative_rms": one.relative_rms,
                "cosine": one.cosine,
            }
            for one in worst
        ],
        "bit_exact_with_max": {
            "projections": sum(one.is_max for one in comparisons),
            "compared": len(comparisons),
        },
    }


def _summary(layer: int, name: str, group: Sequence[Comparison]) -> dict[str, Any]:
    sums = [sum(values) for values in zip(*(one.sums for one in group), strict=True)]
    whole = Comparison(group[0].projection, ErrorSums(*sums), 0.0, 0, False, 0)
    worst = max(group, key=lambda one: one.relative_rms)
    return {
        "layer": layer,
        "projection": name,
        "relative_rms": whole.relative_rms,
        "cosine": whole.cosine,
        "worst": {"expert": worst.projection.expert, "relative_rms": worst.relative_rms},
    }


# ---- judging


def suspicious(comparisons: Sequence[Comparison], *, far: float) -> list[Comparison]:
    """What must be looked at again: far from its source, or ``far`` times as far as its kind."""
    sound = [one for one in comparisons if one.is_number and one.sums.square > 0]
    typical = {
        name: statistics.median(one.relative_rms for one in sound if one.projection.name == name)
        for name in {one.projection.name for one in sound}
    }
    return [
        one
        for one in sound
        if one.cosine < LOW_COSINE
        or not abs(one.factor - 1) <= FACTOR_TOLERANCE
        or one.relative_rms > far * typical[one.projection.name]
    ]


def check_zeros(comparisons: Sequence[Comparison], told: Collection[str]) -> Iterator[Finding]:
    """V05: projections that are zero in the source. ``told``: tensors that other rules name."""
    noisy = [
        one.projection
        for one in comparisons
        if one.sums.square == 0
        and one.sums.quantized_square != 0
        and one.projection.tensor() not in told
    ]
    if noisy:
        message = f"{len(noisy):,} projections are zero in the source and not here."
        yield found("V05", [one.tensor() for one in noisy], message)


def check_bits(comparisons: Sequence[Comparison], told: Collection[str]) -> Iterator[Finding]:
    """V03: the few projections of a max export that nvidia-modelopt would write otherwise."""
    others = [
        one
        for one in comparisons
        if not one.is_max and one.sums.square > 0 and one.projection.tensor() not in told
    ]
    if others and len(others) <= FEW * len(comparisons):
        codes = sum(one.different_codes for one in others)
        message = (
            f"{len(others):,} of {len(comparisons):,} projections are not bit for bit what"
            f" nvidia-modelopt writes, all others are; {codes:,} codes differ."
        )
        yield found("V03", [one.projection.tensor() for one in others], message)


def check_blocks_against_max(
    comparisons: Sequence[Comparison], told: Collection[str]
) -> Iterator[Finding]:
    """V04: blocks of an export by another method that "max" would have brought nearer."""
    others = [
        one
        for one in comparisons
        if one.farther_blocks and one.is_number and one.projection.tensor() not in told
    ]
    if others:
        blocks = sum(one.farther_blocks for one in others)
        # A block scale is one byte.
        of = sum(one.projection.parts["weight_scale"].nbytes for one in comparisons)
        message = (
            f"{blocks:,} of {of:,} blocks, in {len(others):,} of {len(comparisons):,} projections,"
            " have a larger squared error than plain max would give them."
        )
        yield found("V04", [one.projection.tensor() for one in others], message)


def errs_as_max(w: Tensor, q: NVFP4Tensor, amax: float) -> bool:
    """Whether "max" with the pool's amax would be about as far from w: then nothing is wrong."""
    if not (math.isfinite(amax) and is_usable(q.weight_scale_2.item())):
        return False
    wanted = kernels.quantize(w, nvfp4.weight_scale_2(amax))
    own = kernels.compare(w, wanted).error_square
    return kernels.compare(w, q).error_square <= OWN_ERROR**2 * own
