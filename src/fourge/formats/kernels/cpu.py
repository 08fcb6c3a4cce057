"""NVFP4 on one CPU core, compiled by numba; bit for bit nvfp4.py.

Work goes in chunks that stay in the L1 cache, in flat passes that LLVM vectorises: one loop over
blocks that did everything ran 9 times slower. Releases the GIL; call it from threads.
Compiled at the first import (1.6 s) and cached: beside this file, else in the user's cache folder,
or in NUMBA_CACHE_DIR. Reads pairs of weights (pairs.py).

Array suffixes: P pairs of weights, B blocks of 16, V 16-bit words.
"""

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from fourge.formats import e2m1
from fourge.formats.kernels.pairs import as_pairs
from fourge.formats.nvfp4 import (
    ErrorSums,
    NVFP4Tensor,
    check_activations,
    check_amax_input,
    check_comparable,
    expanded,
    outputs,
)

Array = np.ndarray[Any, Any]

u8, u16, u32, f32 = np.uint8, np.uint16, np.uint32, np.float32

PAIRS = 8  # per block of 16
CHUNK = 256  # blocks: 8 KB of weights, 8 KB of divisors, 2 KB of codes

# Values of the 16 codes, and of the 256 E4M3 bytes.
VALUES = np.array([*e2m1.MAGNITUDES, *(-m for m in e2m1.MAGNITUDES)], dtype=np.float32)
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def amax(w: Tensor) -> float:
    """As nvfp4.amax."""
    check_amax_input(w)
    words_V = w.detach().contiguous().view(torch.uint16).numpy().reshape(-1)
    bits = u32(_max_magnitude(words_V)) << u32(16)
    return float(bits.view(f32))


def quantize(w: Tensor, scale_2: Tensor, out: NVFP4Tensor | None = None) -> NVFP4Tensor:
    """As nvfp4.quantize."""
    out = outputs(w, scale_2, out)
    _quantize(
        as_pairs(w).numpy().view(u32),
        f32(out.weight_scale_2.item()),
        out.weight.numpy().reshape(-1),
        out.weight_scale.view(torch.uint8).numpy().reshape(-1),
    )
    return out


def dequantize(q: NVFP4Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """As nvfp4.dequantize."""
    result = expanded(q, dtype, out)
    target = result if dtype != torch.float16 and result.is_contiguous() else None
    if target is None:
        target = torch.empty(result.shape, dtype=torch.float32)
    arguments = (*_stored(q), f32(q.weight_scale_2.item()))
    if target.dtype == torch.bfloat16:
        _expand_to_bfloat16(*arguments, target.view(torch.uint16).numpy().reshape(-1))
    else:
        _expand(*arguments, target.numpy().reshape(-1))
    return result if target is result else result.copy_(target)


def quantize_activations(x: Tensor, input_scale: Tensor) -> Tensor:
    """As nvfp4.quantize_activations, float32 or bfloat16."""
    check_activations(x)
    x = x.detach().contiguous()
    out = torch.empty_like(x)
    scale = f32(input_scale.item())
    if x.dtype == torch.bfloat16:
        words, rounded = (one.view(torch.uint16).numpy().reshape(-1) for one in (x, out))
        _round_bfloat16(words, rounded, scale)
    else:
        _round(x.numpy().reshape(-1), out.numpy().reshape(-1), scale)
    return out


def compare(w: Tensor, q: NVFP4Tensor) -> ErrorSums:
    """As nvfp4.compare."""
    check_comparable(w, q)
    sums = np.zeros(4, np.float64)
    words = w.detach().contiguous().view(torch.uint16).numpy().reshape(-1)
    _error_sums(words, *_stored(q), f32(q.weight_scale_2.item()), sums)
    return ErrorSums(*sums.tolist())


def count_scales(weight_scale: Tensor) -> list[int]:
    """As nvfp4.count_scales."""
    counts = np.zeros((4, 256), np.int64)
    _count_bytes(weight_scale.contiguous().view(torch.uint8).numpy().reshape(-1), counts)
    return counts.sum(axis=0).tolist()


def _stored(q: NVFP4Tensor) -> tuple[Array, Array]:
    """Packed codes and E4M3 bytes, flat."""
    packed = q.weight.contiguous().numpy().reshape(-1)
    return packed, q.weight_scale.contiguous().view(torch.uint8).numpy().reshape(-1)


@njit(error_model="numpy")
def _block_amax(pairs_P: Array, amax_B: Array) -> None:
    """float32 bits of the largest magnitude of each block."""
    for b in range(amax_B.size):
        largest = u32(0)
        for i in range(PAIRS):
            pair = pairs_P[b * PAIRS + i]
            even = (pair << u32(16)) & u32(0x7FFF0000)
            odd = pair & u32(0x7FFF0000)
            largest = max(largest, max(even, odd))
        amax_B[b] = largest


@njit(error_model="numpy")
def _block_scale(amax_B: Array, scale_2: np.float32, scale_B: Array, divisor_B: Array) -> None:
    """E4M3 bytes of the block scales, and the float32 divisors that they make with scale_2."""
    largest = f32(6.0) * scale_2
    for b in range(amax_B.size):
        scale = amax_B[b] / largest
        scale = f32(1.0) if scale == f32(0.0) else scale
        code = _to_e4m3(min(max(scale, f32(2.0**-9)), f32(448.0)))
        scale_B[b] = u8(code)
        divisor_B[b] = _from_e4m3(code) * scale_2


@njit(error_model="numpy")
def _repeat(divisor_B: Array, divisor_P: Array) -> None:
    for b in range(divisor_B.size):
        divisor = divisor_B[b]
        for i in range(PAIRS):
            divisor_P[b * PAIRS + i] = divisor


@njit(error_model="numpy")
def _codes(pairs_P: Array, divisor_P: Array, packed_P: Array) -> None:
    for i in range(pairs_P.size):
        pair = pairs_P[i]
        even = u32(pair << u32(16)).view(f32) / divisor_P[i]
        odd = u32(pair & u32(0xFFFF0000)).view(f32) / divisor_P[i]
        packed_P[i] = u8(_encode(odd) << u32(4) | _encode(even))


@njit(error_model="numpy")
def _encode(x: np.float32) -> np.uint32:
    """e2m1.encode of one float32, without a branch."""
    magnitude = abs(x)
    index = u32(magnitude > f32(0.25))
    index += u32(magnitude >= f32(0.75))
    index += u32(magnitude > f32(1.25))
    index += u32(magnitude >= f32(1.75))
    index += u32(magnitude > f32(2.5))
    index += u32(magnitude >= f32(3.5))
    index += u32(magnitude > f32(5.0))
    return u32(x < f32(0.0)) << u32(3) | index


@njit(error_model="numpy")
def _to_e4m3(x: np.float32) -> np.uint32:
    """Code of a float32 in [2^-9, 448], to nearest even."""
    bits = f32(x).view(u32)
    # Normal: the mantissa loses 20 bits, the exponent bias goes from 127 to 7.
    normal = ((bits + u32(0x7FFFF) + ((bits >> u32(20)) & u32(1))) >> u32(20)) - u32(120 << 3)
    # Subnormal, in steps of 2^-9: the spacing of float32 at 2^14, so that the addition rounds.
    subnormal = f32(x + f32(2.0**14)).view(u32) - f32(2.0**14).view(u32)
    return normal if x >= f32(2.0**-6) else subnormal


@njit(error_model="numpy")
def _from_e4m3(code: np.uint32) -> np.float32:
    """float32 of a positive code, exact."""
    normal = u32((code << u32(20)) + u32(120 << 23)).view(f32)
    subnormal = f32(code) * f32(2.0**-9)
    return normal if code >= u32(8) else subnormal


@njit(error_model="numpy")
def _to_bfloat16(x: np.float32) -> np.uint16:
    """Bits of the nearest bfloat16, ties to even; a NaN stays one."""
    bits = f32(x).view(u32)
    if bits & u32(0x7FFFFFFF) > u32(0x7F800000):
        return u16(0x7FC0)
    return u16((bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16))


@njit(error_model="numpy")
def _round_block(x_S: Array, out_S: Array, input_scale: np.float32) -> None:
    """One block of 16 float32 to NVFP4 and back."""
    largest = f32(0.0)
    for i in range(x_S.size):
        # Not max(): a NaN must stay, as it does in torch.
        largest = abs(x_S[i]) if not abs(x_S[i]) <= largest else largest
    scale = min(largest / (f32(6.0) * input_scale), f32(448.0))
    # Below 2^-9 only 0 and 2^-9 are near: the midpoint goes to the even one, 0.
    if scale < f32(2.0**-9):
        rounded = f32(2.0**-9) if scale > f32(2.0**-10) else f32(0.0)
    else:
        rounded = _from_e4m3(_to_e4m3(f32(scale)))
    divisor = rounded * input_scale
    for i in range(x_S.size):
        value = f32(0.0) if not divisor > f32(0.0) else x_S[i] / divisor
        out_S[i] = VALUES[_encode(f32(value))] * divisor


@njit("uint16(uint16[::1])", nogil=True, cache=True)
def _max_magnitude(words_V: Array) -> np.uint16:
    """Largest bfloat16 bits without sign: they order as the values do, infinity and NaN on top."""
    largest = u16(0)
    for i in range(words_V.size):
        largest = max(largest, u16(words_V[i] & u16(0x7FFF)))
    return largest


@njit(
    "void(uint32[::1], float32, uint8[::1], uint8[::1])",
    nogil=True,
    cache=True,
    error_model="numpy",
)
def _quantize(pairs_P: Array, scale_2: np.float32, packed_P: Array, scale_B: Array) -> None:
    amax_B = np.empty(CHUNK, u32)
    divisor_B = np.empty(CHUNK, f32)
    divisor_P = np.empty(CHUNK * PAIRS, f32)
    for start in range(0, scale_B.size, CHUNK):
        stop = min(start + CHUNK, scale_B.size)
        n = stop - start
        chunk_P = pairs_P[start * PAIRS : stop * PAIRS]
        _block_amax(chunk_P, amax_B[:n])
        _block_scale(amax_B[:n].view(f32), scale_2, scale_B[start:stop], divisor_B[:n])
        _repeat(divisor_B[:n], divisor_P[: n * PAIRS])
        _codes(chunk_P, divisor_P[: n * PAIRS], packed_P[start * PAIRS : stop * PAIRS])


@njit(
    "void(uint8[::1], uint8[::1], float32, float32[::1])",
    nogil=True,
    cache=True,
    error_model="numpy",
)
def _expand(packed_P: Array, scale_B: Array, scale_2: np.float32, out: Array) -> None:
    for b in range(scale_B.size):
        divisor = E4M3[scale_B[b]] * scale_2
        for i in range(b * PAIRS, (b + 1) * PAIRS):
            out[2 * i] = VALUES[packed_P[i] & 15] * divisor
            out[2 * i + 1] = VALUES[packed_P[i] >> 4] * divisor


@njit(
    "void(uint8[::1], uint8[::1], float32, uint16[::1])",
    nogil=True,
    cache=True,
    error_model="numpy",
)
def _expand_to_bfloat16(packed_P: Array, scale_B: Array, scale_2: np.float32, out: Array) -> None:
    for b in range(scale_B.size):
        divisor = E4M3[scale_B[b]] * scale_2
        for i in range(b * PAIRS, (b + 1) * PAIRS):
            out[2 * i] = _to_bfloat16(f32(VALUES[packed_P[i] & 15] * divisor))
            out[2 * i + 1] = _to_bfloat16(f32(VALUES[packed_P[i] >> 4] * divisor))


@njit("void(float32[::1], float32[::1], float32)", nogil=True, cache=True, error_model="numpy")
def _round(x: Array, out: Array, input_scale: np.float32) -> None:
    for start in range(0, x.size, 2 * PAIRS):
        stop = start + 2 * PAIRS
        _round_block(x[start:stop], out[start:stop], input_scale)


@njit("void(uint16[::1], uint16[::1], float32)", nogil=True, cache=True, error_model="numpy")
def _round_bfloat16(x: Array, out: Array, input_scale: np.float32) -> None:
    block, result = np.empty(2 * PAIRS, f32), np.empty(2 * PAIRS, f32)
    for start in range(0, x.size, 2 * PAIRS):
        for i in range(2 * PAIRS):
            block[i] = u32(u32(x[start + i]) << u32(16)).view(f32)
        _round_block(block, result, input_scale)
        for i in range(2 * PAIRS):
            out[start + i] = _to_bfloat16(result[i])


@njit(
    "void(uint16[::1], uint8[::1], uint8[::1], float32, float64[::1])",
    nogil=True,
    cache=True,
    error_model="numpy",
)
def _error_sums(
    words: Array, packed_P: Array, scale_B: Array, scale_2: np.float32, sums: Array
) -> None:
    for b in range(scale_B.size):
        divisor = E4M3[scale_B[b]] * scale_2
        for i in range(b * PAIRS, (b + 1) * PAIRS):
            for half in range(2):
                bits = u32(u32(words[2 * i + half]) << u32(16))
                w = np.float64(bits.view(f32))
                code = (packed_P[i] >> u8(4 * half)) & u8(15)
                d = np.float64(VALUES[code] * divisor)
                sums[0] += w * w
                sums[1] += d * d
                sums[2] += w * d
                sums[3] += (w - d) * (w - d)


@njit("void(uint8[::1], int64[:, ::1])", nogil=True, cache=True)
def _count_bytes(bytes_V: Array, counts: Array) -> None:
    """Four tables, since neighbours are often equal and would wait for each other's sum."""
    whole = bytes_V.size - bytes_V.size % 4
    for i in range(0, whole, 4):
        counts[0, bytes_V[i]] += 1
        counts[1, bytes_V[i + 1]] += 1
        counts[2, bytes_V[i + 2]] += 1
        counts[3, bytes_V[i + 3]] += 1
    for i in range(whole, bytes_V.size):
        counts[0, bytes_V[i]] += 1
