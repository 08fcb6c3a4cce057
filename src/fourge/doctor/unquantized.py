"""Rules K08 and K09: what is not quantized must be the source's, byte for byte.

Both sides are streamed in pieces and compared directly; with ``sample`` only the first piece of
every tensor. Tensors of other shape or dtype are named by other rules and left to them.
Peak memory: four pieces per thread.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from fourge.checkpoint.header import TensorInfo
from fourge.checkpoint.names import Role
from fourge.doctor.evidence import CORRECTION_BIAS, Evidence
from fourge.doctor.findings import Finding, found
from fourge.doctor.passes import Progress, in_parallel, num_workers
from fourge.doctor.shapes import is_collapsed
from fourge.doctor.sharing import PLAIN_DTYPES

PIECE_BYTES = 4 << 20
FIRST_BYTES = 4096


class Pair(NamedTuple):
    """The same tensor here and in the source."""

    ours: TensorInfo
    theirs: TensorInfo


class Difference(NamedTuple):
    """Where two tensors differ first, and whether ours holds nothing but zeros."""

    pair: Pair
    byte: int
    is_zero: bool


def check_unquantized(
    evidence: Evidence, source: Evidence, *, sample: bool, memory: int | None, on_progress: Progress
) -> Iterator[Finding]:
    """K08 and K09."""
    pairs = [
        Pair(info, source.tensors[name])
        for name, info in evidence.tensors.items()
        if name in source.tensors
    ]
    recast = [pair for pair in pairs if _is_recast(pair)]
    equal = [pair for pair in pairs if pair.ours[1:3] == pair.theirs[1:3] and pair.ours.nbytes]
    total = sum(_compared_bytes(pair, sample) for pair in equal)
    workers = num_workers(4 * PIECE_BYTES, memory)
    compare = partial(_compare, evidence, source, sample=sample)
    done, different = 0, []
    for pair, difference in zip(equal, in_parallel(compare, equal, workers), strict=True):
        done += _compared_bytes(pair, sample)
        on_progress("unquantized tensors", done, total)
        if difference is not None:
            different.append(difference)
    yield from _zeros([one for one in different if one.is_zero])
    yield from _changed([one for one in different if not one.is_zero], recast, len(pairs))


def check_empty(evidence: Evidence) -> Iterator[Finding]:
    """K08 without a source: tensors without elements, and what is never all zero."""
    empty = [name for name, info in evidence.tensors.items() if not info.nbytes]
    if empty:
        yield found("K08", empty, f"{len(empty):,} tensors have no elements.")
    if evidence.source is None and evidence.files.is_local:
        zero = [
            name
            for name, parsed in evidence.names.items()
            if parsed is not None
            and parsed.role != Role.ROUTED_EXPERT
            and name.endswith(".weight")
            and evidence.tensors[name].dtype in PLAIN_DTYPES
            and _is_zero(evidence, evidence.tensors[name])
        ]
        if zero:
            yield found("K08", zero, f"{len(zero):,} tensors are all zero.")


def _is_zero(evidence: Evidence, info: TensorInfo) -> bool:
    """Whether a tensor has elements, all of them 0. Of one that has not, little is read."""
    begin, count = 0, FIRST_BYTES
    while begin < info.nbytes:
        data = evidence.files.read(info.file, info.start + begin, min(count, info.nbytes - begin))
        if np.frombuffer(data, np.uint8).any() or not data:
            return False
        begin, count = begin + len(data), PIECE_BYTES
    return info.nbytes > 0


def _is_recast(pair: Pair) -> bool:
    """Whether only the dtype is another one, and no rule of dtypes names it."""
    floats = ("BF16", "F16", "F32")
    return (
        pair.ours.dtype != pair.theirs.dtype
        and pair.ours.dtype in floats
        and pair.theirs.dtype in floats
        and pair.ours.shape == pair.theirs.shape
        and not pair.ours.name.endswith(CORRECTION_BIAS)
    )


def _compared_bytes(pair: Pair, sample: bool) -> int:
    return min(pair.ours.nbytes, PIECE_BYTES) if sample else pair.ours.nbytes


def _compare(
    evidence: Evidence, source: Evidence, pair: Pair, *, sample: bool
) -> Difference | None:
    byte: int | None = None
    is_zero = True
    for begin in range(0, _compared_bytes(pair, sample), PIECE_BYTES):
        count = min(PIECE_BYTES, pair.ours.nbytes - begin)
        ours = evidence.files.read(pair.ours.file, pair.ours.start + begin, count)
        theirs = source.files.read(pair.theirs.file, pair.theirs.start + begin, count)
        is_zero = is_zero and not np.frombuffer(ours, np.uint8).any()
        if byte is None and ours != theirs:
            a, b = np.frombuffer(ours, np.uint8), np.frombuffer(theirs, np.uint8)
            length = min(len(a), len(b))
            unequal = np.flatnonzero(a[:length] != b[:length])
            byte = begin + int(unequal[0] if len(unequal) else length)
        if byte is not None and not is_zero:
            break
    if byte is None or _collapsed(evidence, pair.ours):
        return None
    return Difference(pair, byte, is_zero)


def _collapsed(evidence: Evidence, info: TensorInfo) -> bool:
    """Whether this is a correction bias that rule D01 names: it went through 16 bits, or is NaN."""
    if not info.name.endswith(CORRECTION_BIAS) or info.dtype != "F32":
        return False
    data = evidence.files.read(info.file, info.start, info.nbytes)
    return is_collapsed(data) or not np.isfinite(np.frombuffer(data, "<f4")).all()


def _zeros(different: list[Difference]) -> Iterator[Finding]:
    if different:
        message = f"{len(different):,} tensors are all zero, and those of the source are not."
        yield found("K08", [one.pair.ours.name for one in different], message)


def _changed(different: list[Difference], recast: list[Pair], pairs: int) -> Iterator[Finding]:
    names = [one.pair.ours.name for one in different] + [pair.ours.name for pair in recast]
    if not names:
        return
    told = []
    if different:
        first = different[0]
        told.append(f"{first.pair.ours.name} differs from byte {first.byte:,} on")
    if recast:
        ours, theirs = recast[0]
        told.append(f"{ours.name} is {ours.dtype}, in the source {theirs.dtype}")
    if len(names) > pairs / 2:
        told.append("was it made from this source?")
    message = f"{len(names):,} of {pairs:,} unquantized tensors differ: {'; '.join(told)}."
    yield found("K09", names, message)
