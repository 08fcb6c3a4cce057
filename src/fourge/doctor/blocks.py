"""Rules S on block scales: S01, S02, S06, S09 and S10, from one pass over all of their bytes.

Codes are read only where a scale raises a question: scales of 0, of 448, or none of 448 in an
export where all others have one. In such an export ("max") the block with a tensor's largest weight
has the scale 448, and so has one block of every expert's gate and up together, which share
weight_scale_2; nvidia-modelopt's four-over-six and MSE exports are not like that.
Needs torch (kernels). Peak memory: block scales and codes of one projection per thread.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fourge.checkpoint.header import TensorInfo
from fourge.doctor.evidence import Evidence, Projection
from fourge.doctor.files import Files
from fourge.doctor.findings import Finding, found
from fourge.doctor.passes import Progress, in_parallel, load_bytes, num_workers
from fourge.doctor.scales import POOLS, expert_place, is_usable, pool_of
from fourge.formats import kernels
from fourge.formats.layout import BLOCK_SIZE

CODE_BYTES = BLOCK_SIZE // 2  # of one block
NAN, MINUS = (0x7F, 0xFF), range(0x80, 0xFF)
ZERO, SMALLEST, ONE, LARGEST = 0x00, 0x01, 0x38, 0x7E
# Codes of blocks with less than this between them are read together.
HOLE_BYTES = 16 << 10
# Part of a projection's blocks at an end of the range that no sound quantizer leaves there.
CROWDED = 0.25
# At 448 that is clipping only if there are so many more than at 416: scales of weights of a bounded
# law crowd below 448 as well.
STEEP = 2
# Part of the experts that must have the scale 448 for an export to be a "max" one, and how many.
EVIDENT, MANY = 0.9, 4
# Experts whose gate and up both reach 448 with one weight_scale_2: by chance those do whose largest
# weights are within NEAR of each other (which rounds up to 448). How common that is, weight_scale_2
# of neighbouring experts shows: weights of a bounded law all have the same.
TIED_LATER, MANY_PAIRS = 0.99, 64
# Blocks whose codes are read of every projection; the part of them without a code 6 that damage may
# explain. Of searched scales it is a third and more.
LOOK_AT, SHORT = 64, 0.05
NEAR, COMMON = 448 / 432, 0.75


@dataclass(frozen=True, slots=True)
class BlockFacts:
    """What the block scales of one projection are like: numbers of blocks."""

    projection: Projection
    blocks: int
    nan: int
    negative: int
    smallest: int  # at 2^-9
    largest: int  # at 448
    second: int  # at 416
    highest: int  # the largest byte that is a number
    plain: int  # at 1, as all of a projection of zeros are
    lost: int  # of scale 0 with codes that are not
    idle: int  # at 448 with codes of 0 only
    flat: int  # at 448 with codes of +-6 only
    looked_at: int  # blocks at the beginning whose codes were read
    short: int  # of those, with weights but none that reaches the code 6, as ``max`` makes one
    typical: float  # their median, as a number

    @property
    def crowded(self) -> int:
        """Blocks at the end of the range where there are too many, 0 where there are not."""
        clipped = self.largest - self.idle - self.flat
        most = max(self.smallest, clipped if clipped > STEEP * self.second else 0)
        return most if most > CROWDED * self.blocks else 0


def scan_blocks(
    evidence: Evidence, *, sample: bool, memory: int | None, on_progress: Progress
) -> list[BlockFacts]:
    """Read the block scales of all packed experts, or with ``sample`` of one per layer."""
    chosen = sorted(
        (one for one in evidence.experts.values() if _is_whole(one)),
        key=lambda one: (one.parts["weight_scale"].file, one.parts["weight_scale"].start),
    )
    if sample:
        chosen = [one for one in chosen if one.expert == sampled_expert(evidence, one.layer)]
    total = sum(one.parts["weight_scale"].nbytes for one in chosen)
    largest = max((one.parts["weight"].nbytes for one in chosen), default=0)
    workers = num_workers(2 * largest, memory)
    facts, done = [], 0
    for one in in_parallel(partial(_examine, evidence.files), chosen, workers):
        facts.append(one)
        done += one.blocks
        on_progress("block scales", done, total)
    return facts


def sampled_expert(evidence: Evidence, layer: int) -> int:
    """The expert that stands for its layer: another one in each."""
    experts = sorted(evidence.by_layer[layer])
    return experts[layer % len(experts)]


def check_blocks(evidence: Evidence, facts: Sequence[BlockFacts]) -> Iterator[Finding]:
    """All findings that the facts give."""
    yield from _damaged(evidence, facts)
    idle = [one for one in facts if one.idle]
    if idle:
        message = f"{sum(one.idle for one in idle):,} blocks of zeros have the scale 448."
        yield found("S10", [one.projection.tensor("weight_scale") for one in idle], message)
    crowded = [one for one in facts if not _is_damaged(one) and one.crowded]
    if crowded:
        worst = max(crowded, key=lambda one: one.crowded / one.blocks)
        end = "448" if worst.crowded != worst.smallest else "2^-9"
        message = (
            f"{worst.crowded / worst.blocks:.0%} of the block scales of"
            f" {worst.projection.tensor()} are {end}."
        )
        yield found("S09", [one.projection.tensor("weight_scale") for one in crowded], message)
    yield from _overwritten(evidence, facts)


def is_max_export(facts: Sequence[BlockFacts]) -> bool:
    """Whether scales are amax / 6: nearly all experts' largest block scale is 448, and the largest
    weight of nearly every block has the code 6. Scales that were searched for leave many below.
    """
    looked_at, short = sum(one.looked_at for one in facts), sum(one.short for one in facts)
    if short > SHORT * looked_at:
        return False
    highest = [
        max(one.highest for one in pool)
        for pool in _pooled(facts).values()
        if not all(one.plain == one.blocks or _is_damaged(one) for one in pool)
    ]
    return len(highest) >= MANY and highest.count(LARGEST) >= EVIDENT * len(highest)


def names_zero_expert(evidence: Evidence, facts: Sequence[BlockFacts]) -> set[str]:
    """Names of the weight_scale_2 that S01 accounts for: 0, with block scales that are NaN."""
    return {
        one.projection.tensor("weight_scale_2")
        for one in facts
        if one.nan and evidence.scalar(one.projection, "weight_scale_2") == 0
    }


def typical_scales(facts: Sequence[BlockFacts]) -> dict[str, float]:
    """Name of a weight_scale_2 -> the median block scale that goes with it, where that tells how
    large the weights are.
    """
    return {
        one.projection.tensor("weight_scale_2"): one.typical
        for one in facts
        if not (_is_damaged(one) or one.crowded or one.plain == one.blocks)
    }


def is_all_zero(evidence: Evidence, projection: Projection) -> bool:
    """Whether all codes of a projection are 0 (or minus 0)."""
    return not bool(
        _has_weights(load_bytes(evidence.files, projection.parts["weight"])[None]).any()
    )


def _is_whole(projection: Projection) -> bool:
    """Whether shapes and dtypes are such that blocks can be told; shapes.py names the others."""
    weight, scale = projection.parts.get("weight"), projection.parts.get("weight_scale")
    return (
        projection.is_packed
        and weight is not None
        and scale is not None
        and scale.dtype == "F8_E4M3"
        and weight.nbytes == scale.nbytes * CODE_BYTES
        and weight.shape[:-1] == scale.shape[:-1]
        and scale.nbytes > 0
    )


def _examine(files: Files, projection: Projection) -> BlockFacts:
    scale = load_bytes(files, projection.parts["weight_scale"])
    counts = kernels.count_scales(scale.view(torch.float8_e4m3fn))
    lost = idle = flat = 0
    if counts[ZERO] + counts[0x80]:
        codes = _codes(files, projection.parts["weight"], _where((scale & 0x7F) == 0))
        lost = int(_has_weights(codes).sum())
    if counts[LARGEST]:
        codes = _codes(files, projection.parts["weight"], _where(scale == LARGEST))
        idle = int((~_has_weights(codes)).sum())
        flat = int(((codes & 0x77) == 0x77).all(dim=1).sum())
    first = _codes(files, projection.parts["weight"], torch.arange(min(LOOK_AT, len(scale))))
    short = int((_has_weights(first) & ~_reaches_six(first)).sum())
    numbers = [byte for byte in range(LARGEST + 1) if counts[byte]]
    return BlockFacts(
        projection=projection,
        blocks=len(scale),
        nan=sum(counts[byte] for byte in NAN),
        negative=sum(counts[byte] for byte in MINUS),
        smallest=counts[SMALLEST],
        largest=counts[LARGEST],
        second=counts[LARGEST - 1],
        highest=max(numbers, default=0),
        plain=counts[ONE],
        lost=lost,
        idle=idle,
        flat=flat,
        looked_at=len(first),
        short=short,
        typical=_median(counts),
    )


def _median(counts: Sequence[int]) -> float:
    """Of the block scales that are positive numbers, by how many there are of each byte."""
    half = sum(counts[SMALLEST : LARGEST + 1]) / 2
    for byte in range(SMALLEST, LARGEST + 1):
        half -= counts[byte]
        if half <= 0:
            return torch.tensor(byte, dtype=torch.uint8).view(torch.float8_e4m3fn).item()
    return 0.0


def _where(mask: Tensor) -> Tensor:
    """Indices of what is true: three times as fast as torch.nonzero where little is."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def _codes(files: Files, weight: TensorInfo, blocks: Tensor) -> Tensor:
    """The packed codes of some blocks, given in order: uint8 [blocks, 8]. Neighbours are read
    together.
    """
    ends = _where(blocks.diff() * CODE_BYTES > HOLE_BYTES) + 1
    pieces = []
    for run in torch.tensor_split(blocks, ends):
        if len(run):
            first, count = int(run[0]), int(run[-1] - run[0]) + 1
            data = load_bytes(files, weight, first * CODE_BYTES, count * CODE_BYTES)
            pieces.append(data.view(-1, CODE_BYTES)[run - first])
    return torch.cat(pieces)


def _has_weights(codes: Tensor) -> Tensor:
    """bool [blocks]: whether any code is neither 0 nor minus 0."""
    return ((codes & 0x77) != 0).any(dim=1)


def _reaches_six(codes: Tensor) -> Tensor:
    """bool [blocks]: whether any code is 6 or -6."""
    return (((codes & 0x07) == 0x07) | ((codes & 0x70) == 0x70)).any(dim=1)


def _damaged(evidence: Evidence, facts: Sequence[BlockFacts]) -> Iterator[Finding]:
    broken = [one for one in facts if one.nan or one.negative]
    if broken:
        nan, negative = sum(one.nan for one in broken), sum(one.negative for one in broken)
        zero = sum(evidence.scalar(one.projection, "weight_scale_2") == 0 for one in broken)
        kinds = [f"{nan:,} are NaN"] * bool(nan) + [f"{negative:,} negative"] * bool(negative)
        told = f"of their block scales {' and '.join(kinds)}"
        if zero:
            told += f"; {zero:,} have weight_scale_2 = 0: nvidia-modelopt's all-zero experts"
        places = [one.projection.tensor("weight_scale") for one in broken]
        yield found("S01", places, f"{len(broken):,} projections: {told}.")
    lost = [one for one in facts if one.lost]
    if lost:
        message = f"{sum(one.lost for one in lost):,} blocks with weights have the scale 0."
        yield found("S02", [one.projection.tensor("weight_scale") for one in lost], message)


def _is_damaged(facts: BlockFacts) -> bool:
    return bool(facts.nan or facts.negative or facts.lost)


def _pooled(facts: Sequence[BlockFacts]) -> dict[tuple[int, int, str], list[BlockFacts]]:
    """(layer, expert, pool) -> the projections that share weight_scale_2."""
    pools: dict[tuple[int, int, str], list[BlockFacts]] = {}
    for one in facts:
        own = one.projection
        pools.setdefault((own.layer, own.expert, pool_of(own.name)), []).append(one)
    return pools


def _overwritten(evidence: Evidence, facts: Sequence[BlockFacts]) -> Iterator[Finding]:
    """S06: experts whose weight_scale_2 is not the one that their codes were made with."""
    if not is_max_export(facts):
        return
    # What another rule names already would only be named twice.
    pools = {
        key: pool
        for key, pool in _pooled(facts).items()
        if len(pool) == len(POOLS[key[2]])
        and not any(_is_damaged(one) or one.crowded for one in pool)
    }
    low = [
        pool[0].projection
        for pool in pools.values()
        if max(one.highest for one in pool) != LARGEST
        and all(_has_usable_scale(evidence, one.projection) for one in pool)
        and not all(is_all_zero(evidence, one.projection) for one in pool)
    ]
    if low:
        message = (
            f"the largest block scale of {len(low):,} projections is not 448, as it is in all"
            " others: weight_scale_2 was changed after packing, or the scales were."
        )
        yield found("S06", [one.tensor("weight_scale_2") for one in low], message)
    yield from _tied_later(evidence, pools)


def _tied_later(
    evidence: Evidence, pools: Mapping[tuple[int, int, str], list[BlockFacts]]
) -> Iterator[Finding]:
    """Gate and up that were each quantized with their own scale and given one afterwards."""
    pairs = [
        pool
        for (_, _, kind), pool in pools.items()
        if kind == "gate_up"
        and len(pool) == 2
        and not any(one.flat or one.plain == one.blocks for one in pool)
    ]
    tied = [
        pool[0].projection
        for pool in pairs
        if all(one.highest == LARGEST for one in pool)
        and len({evidence.scalar(one.projection, "weight_scale_2") for one in pool}) == 1
    ]
    is_odd = len(pairs) >= MANY_PAIRS and _share_of_near(evidence, pairs) < COMMON
    if is_odd and len(tied) >= TIED_LATER * len(pairs):
        message = (
            f"gate and up of {len(tied):,} of {len(pairs):,} experts both reach the block scale"
            " 448, though only the larger of two weights with one weight_scale_2 does: it was"
            " overwritten after packing."
        )
        yield found("S06", [expert_place(one) for one in tied], message)


def _share_of_near(evidence: Evidence, pairs: Sequence[list[BlockFacts]]) -> float:
    """Of neighbouring experts, the part whose weight_scale_2 are within NEAR of each other."""
    own = [pool[0].projection for pool in pairs]
    ratios = [
        evidence.scalars[one.tensor("weight_scale_2")]
        / evidence.scalars[other.tensor("weight_scale_2")]
        for one, other in itertools.pairwise(own)
        if one.layer == other.layer
        and all(_has_usable_scale(evidence, either) for either in (one, other))
    ]
    near = sum(1 / NEAR < ratio < NEAR for ratio in ratios)
    return near / len(ratios) if ratios else 1.0


def _has_usable_scale(evidence: Evidence, projection: Projection) -> bool:
    value = evidence.scalar(projection, "weight_scale_2")
    return value is not None and is_usable(value)
