"""Random values for random_checkpoint.py: the bytes of one tensor from a seed and its name.

Only PCG64's raw bits, exact integer sums and one IEEE product and sum each: the same bytes with
every version of numpy. Expert projections hold traps, in every sparse layer:

  expert 0   two all-zero 16-blocks and some minus zeros
  expert 1   gate and up all zero
  expert 2   down all zero
  expert 3   up 4 times larger than gate; down full of exact rounding ties
  expert 4   a row of about 1e-6 and a row 64 times too large
  the last eighth of the experts (at least one) is routed away by a correction bias of -10
"""

import functools
import math
import zlib
from typing import NamedTuple

import numpy as np

# The sum of 12 uniform 16-bit numbers is nearly normal, and exact.
_SUMMANDS = 12
_UNIT = np.float32(1 / 65536)


class Part(NamedTuple):
    """A matrix or vector that is drawn at once: the per-expert name that seeds it, and its law."""

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float


def cold_experts(num_experts: int) -> range:
    """The experts that the traps route away from."""
    return range(num_experts - max(1, num_experts // 8), num_experts)


def part_bytes(part: Part, seed: int, traps: bool) -> bytes:
    """The little-endian bytes of a part, its traps set."""
    index = _random_indices(part, seed)
    if part.name.endswith("e_score_correction_bias"):
        bias = _normal_table()[index] * np.float32(part.std) + np.float32(part.mean)
        if traps:
            bias[cold_experts(len(bias)).start :] = -10.0
        return bias.astype("<f4").tobytes()
    bits = _bf16_table(part.mean, part.std)[index].reshape(part.shape)
    if traps and ".experts." in part.name:
        _set_traps(part.name, bits)
    return bits.astype("<u2", copy=False).tobytes()


def _random_indices(part: Part, seed: int) -> np.ndarray:
    """One uniform uint16 for every element of the part."""
    count = math.prod(part.shape)
    source = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(part.name.encode())]))
    return source.random_raw(-(-count // 4)).astype("<u8", copy=False).view("<u2")[:count]


@functools.cache
def _normal_table() -> np.ndarray:
    """65,536 float32 values with mean about 0 and standard deviation about 1, all exact."""
    raw = np.random.PCG64(0).random_raw(65536 * _SUMMANDS // 4).astype("<u8", copy=False)
    sums = raw.view("<u2").reshape(65536, _SUMMANDS).sum(axis=1, dtype=np.int64)
    return (sums - _SUMMANDS * 32768).astype(np.float32) * _UNIT


@functools.lru_cache(maxsize=64)
def _bf16_table(mean: float, std: float) -> np.ndarray:
    return _to_bf16(_normal_table() * np.float32(std) + np.float32(mean))


def _to_bf16(values: np.ndarray) -> np.ndarray:
    """The upper half of the float32 bits, rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _set_traps(name: str, bits: np.ndarray) -> None:
    """Change the bits of one expert's projection in place, as the module docstring says."""
    expert, projection = name.split(".experts.")[1].split(".")[:2]
    match int(expert), projection:
        case 0, _:
            bits[0, :16] = bits[-1, -16:] = 0
            bits[1, ::5] = 0x8000
        case (1, "gate_proj" | "up_proj") | (2, "down_proj"):
            bits[:] = 0
        case 3, "up_proj":
            bits[:] = _to_bf16(_from_bf16(bits) * np.float32(4))
        case 3, "down_proj":
            bits[:] = _exact_ties(bits.shape)
        case 4, _:
            bits[0] = _to_bf16(_from_bf16(bits[0]) * np.float32(2**-17))
            bits[1] = _to_bf16(_from_bf16(bits[1]) * np.float32(64))


def _exact_ties(shape: tuple[int, ...]) -> np.ndarray:
    """BF16 bits whose quotients in "max" NVFP4 are exact rounding ties, of both signs.

    The tensor's amax 2688 * 2^-12 makes weight_scale_2 exactly 2^-12 and every block's scale 448
    or a power of two, so that the quotients are exactly the seven thresholds of E2M1, and 6.
    """
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], np.float32)
    block = np.concatenate([ties, -ties])
    rows, columns = shape
    scales = np.float32(2) ** (np.arange(rows * columns // 16) % 9).astype(np.float32)
    scales[0] = 448
    return _to_bf16(scales[:, None] * block * np.float32(2**-12)).reshape(shape)
