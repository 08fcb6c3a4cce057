"""The search for block scales on one CPU core, compiled by numba; bit for bit search.py.

Goes through 32 rows of one block column at a time, which share its factor, so that loops over rows
vectorise. Not every scale is tried, but none that could be chosen is left out. Starting where
``max`` does:
- downward until what is clipped alone costs more than the best so far: it only grows (_bounds);
- upward until the same is true of what is rounded to zero, or until that is everything, from where
  on larger scales give the same error again;
- a scale is dropped when the first terms of its sum exceed the best in every row: all are >= 0.
Releases the GIL; call it from threads. Compiled at the first import and cached as cpu.py is.

Array suffixes: N rows, K columns, B blocks of a row, S = 16, R rows of a tile.
"""

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from fourge.formats.layout import packed_shape, scale_shape
from fourge.formats.nvfp4 import NVFP4Tensor
from fourge.formats.search import SWEEPS, Descended, check_search

Array = np.ndarray[Any, Any]

u8, u32, i64, f32 = np.uint8, np.uint32, np.int64, np.float32

SIZE = 16
ROWS = 32
AFTER = 10  # the terms above this one, short sums, come first
NUM_SCALES = 126
SCALES = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
CODE_OF_ONE = 0x38
# From 2^23 on, float32 numbers lie 1 apart.
HALVES, ONES, TWOS = f32(1.5 * 2**22), f32(1.5 * 2**23), f32(1.5 * 2**24)
# Bounds hold for exact numbers; float32 sums of 136 terms err by less than this share.
SAFE = 0.99


def search_scales(x: Tensor, scale_2: Tensor, factor: Tensor) -> Tensor:
    """As search.search_scales."""
    check_search(x, factor)
    found = torch.empty(scale_shape(x.shape), dtype=torch.float8_e4m3fn)
    is_full = factor.dim() == 3
    factor_BSS = factor if is_full else torch.diag_embed(factor)
    _search(
        x.detach().contiguous().numpy(), f32(scale_2.item()), factor_BSS.contiguous().numpy(),
        _bounds(factor_BSS), is_full, found.view(torch.uint8).numpy(),
    )  # fmt: skip
    return found


def descend(x: Tensor, weight_scale: Tensor, scale_2: Tensor, measure_SS: Tensor) -> Descended:
    """As search.descend."""
    divisor_N = weight_scale.float() * scale_2
    found = Descended(torch.empty_like(x), torch.empty_like(divisor_N))
    _descend(
        x.contiguous().numpy(), divisor_N.numpy(), measure_SS.contiguous().numpy(),
        *(one.numpy() for one in found),
    )  # fmt: skip
    return found


def round_to(x: Tensor, weight_scale: Tensor, scale_2: Tensor) -> NVFP4Tensor:
    """As search.round_to."""
    packed = torch.empty(packed_shape(x.shape), dtype=torch.uint8)
    divisor = weight_scale.float() * scale_2
    _round_to(x.contiguous().numpy(), divisor.numpy(), packed.numpy())
    return NVFP4Tensor(packed, weight_scale, scale_2)


def _bounds(factor_BSS: Tensor) -> Array:
    """float32 [B, 2, 16]: of H = F F^T, p and q with e^T H e >= p_i e_i^2 for every i, and >= sum_i
    q_i e_i^2. p = 1 / diag(H^-1), where H can be inverted; q = l diag(H) with l the least
    eigenvalue of H scaled to a diagonal of ones.
    """
    factor_BSS = factor_BSS.double()
    inverse_BSS, _ = torch.linalg.inv_ex(factor_BSS)
    single_BS = 1 / inverse_BSS.square().sum(1)  # H^-1 = F^-T F^-1
    diagonal_BS = factor_BSS.square().sum(2)
    scaled_BSS = factor_BSS / diagonal_BS.sqrt().clamp(min=1e-150)[..., None]
    least_B = torch.linalg.svdvals(scaled_BSS)[..., -1].square()
    bounds = torch.stack([single_BS, least_B[..., None] * diagonal_BS], 1)
    return (SAFE * torch.where(bounds.isfinite(), bounds, 0.0)).float().numpy()


@njit(error_model="numpy")
def _nearest_code(x: np.float32) -> Any:
    """Code of the E4M3 number near a positive float32: where the search begins."""
    if not x > f32(2.0**-9):
        return 1
    if x >= f32(448.0):
        return NUM_SCALES
    bits = f32(x).view(u32)
    if x >= f32(2.0**-6):
        return min(i64(((bits + u32(0x7FFFF)) >> u32(20)) - u32(120 << 3)), NUM_SCALES)
    return max(1, int(x * f32(512.0) + f32(0.5)))


@njit(error_model="numpy")
def _nearest(x: np.float32) -> np.float32:
    """e2m1 of a number. Numbers up to 2 lie 0.5 apart, then 1, from 4 on 2: adding and subtracting
    what has float32 numbers that far apart rounds to them, ties to even, as e2m1.encode does.
    """
    a = abs(x)
    apart = HALVES if a < f32(2.0) else (ONES if a < f32(4.0) else TWOS)
    v = (x + apart) - apart
    v = f32(6.0) if v > f32(6.0) else v
    return f32(-6.0) if v < f32(-6.0) else v


@njit(error_model="numpy")
def _encode(x: np.float32) -> np.uint32:
    """e2m1.encode: the index of a magnitude is one more than that of half of it, from 1 on."""
    v = abs(_nearest(x))
    index = u32(f32(2.0) * v) if v < f32(2.0) else (u32(v + f32(2.0)) if v < f32(6.0) else u32(7))
    return u32(x < f32(0.0)) << u32(3) | index


@njit(error_model="numpy")
def _add_row(slope_S: Array, change: np.float32, measure_SS: Array, i: int) -> None:
    for j in range(slope_S.size):
        slope_S[j] += change * measure_SS[i, j]


@njit(error_model="numpy")
def _errors(x_SR: Array, scale_R: Array, e_SR: Array) -> None:
    """e2m1(x / s) s - x."""
    for i in range(SIZE):
        for r in range(scale_R.size):
            x = x_SR[i, r]
            e_SR[i, r] = _nearest(x / scale_R[r]) * scale_R[r] - x


@njit(error_model="numpy")
def _add_terms(
    e_SR: Array, factor_SS: Array, is_full: bool, first: int, stop: int, part_R: Array,
    loss_R: Array,
) -> None:  # fmt: skip
    """Terms first, first - 1 .. stop + 1. Four products at a time, added one after the other."""
    for j in range(first, stop, -1):
        own = factor_SS[j, j]
        for r in range(loss_R.size):
            part_R[r] = own * e_SR[j, r]
        i = j + 1
        while is_full and i + 3 < SIZE:
            f0, f1, f2, f3 = (
                factor_SS[i, j], factor_SS[i + 1, j], factor_SS[i + 2, j], factor_SS[i + 3, j],
            )  # fmt: skip
            e0, e1, e2, e3 = e_SR[i], e_SR[i + 1], e_SR[i + 2], e_SR[i + 3]
            for r in range(loss_R.size):
                part_R[r] = (((part_R[r] + f0 * e0[r]) + f1 * e1[r]) + f2 * e2[r]) + f3 * e3[r]
            i += 4
        while is_full and i < SIZE:
            f0, e0 = factor_SS[i, j], e_SR[i]
            for r in range(loss_R.size):
                part_R[r] += f0 * e0[r]
            i += 1
        for r in range(loss_R.size):
            loss_R[r] += part_R[r] * part_R[r]


@njit(error_model="numpy")
def _any_within(loss_R: Array, best_R: Array) -> bool:
    count = 0
    for r in range(loss_R.size):
        count += loss_R[r] <= best_R[r]
    return count > 0


@njit(error_model="numpy")
def _try(
    code_R: Array, scale_2: np.float32, x_SR: Array, factor_SS: Array, is_full: bool,
    scale_R: Array, e_SR: Array, part_R: Array, loss_R: Array, best_R: Array, found_R: Array,
) -> None:  # fmt: skip
    """Note the rows for which these scales are better than what was found before."""
    for r in range(loss_R.size):
        scale_R[r] = SCALES[code_R[r]] * scale_2
        loss_R[r] = f32(0.0)
    _errors(x_SR, scale_R, e_SR)
    _add_terms(e_SR, factor_SS, is_full, SIZE - 1, AFTER, part_R, loss_R)
    if not _any_within(loss_R, best_R):
        return
    _add_terms(e_SR, factor_SS, is_full, AFTER, -1, part_R, loss_R)
    for r in range(loss_R.size):
        if loss_R[r] < best_R[r] or (loss_R[r] == best_R[r] and code_R[r] < found_R[r]):
            best_R[r], found_R[r] = loss_R[r], code_R[r]


@njit(error_model="numpy")
def _can_improve(
    direction: int, x_SR: Array, scale_R: Array, bound_2S: Array, single_R: Array, sum_R: Array,
    best_R: Array, amax_R: Array,
) -> bool:  # fmt: skip
    """Whether scales beyond these could be better for any row."""
    for r in range(scale_R.size):
        single_R[r], sum_R[r] = f32(0.0), f32(0.0)
    for i in range(SIZE):
        p, q = bound_2S[0, i], bound_2S[1, i]
        for r in range(scale_R.size):
            a, s = abs(x_SR[i, r]), scale_R[r]
            if direction < 0:
                lost = a - f32(6.0) * s
                lost = lost if lost > f32(0.0) else f32(0.0)
            else:
                lost = a if a < f32(0.2499) * s else f32(0.0)
            square = lost * lost
            sum_R[r] += q * square
            single = p * square
            single_R[r] = single if single > single_R[r] else single_R[r]
    count = 0
    for r in range(scale_R.size):
        is_open = sum_R[r] <= best_R[r] and single_R[r] <= best_R[r]
        count += is_open and (direction < 0 or amax_R[r] > f32(0.25) * scale_R[r])
    return count > 0


@njit(
    "void(float32[:, ::1], float32, float32[:, :, ::1], float32[:, :, ::1], boolean,"
    " uint8[:, ::1])",
    nogil=True,
    cache=True,
    error_model="numpy",
)
def _search(
    x_NK: Array, scale_2: np.float32, factor_BSS: Array, bound_B2S: Array, is_full: bool,
    found_NB: Array,
) -> None:  # fmt: skip
    num_rows, num_blocks = found_NB.shape
    x_SR, e_SR = np.zeros((SIZE, ROWS), f32), np.empty((SIZE, ROWS), f32)
    amax_R, best_R = np.empty(ROWS, f32), np.empty(ROWS, f32)
    scale_R, part_R, loss_R = np.empty(ROWS, f32), np.empty(ROWS, f32), np.empty(ROWS, f32)
    start_R, code_R, found_R = np.empty(ROWS, i64), np.empty(ROWS, i64), np.empty(ROWS, i64)
    for b in range(num_blocks):
        factor_SS = factor_BSS[b]
        for first in range(0, num_rows, ROWS):
            count = min(ROWS, num_rows - first)
            x_SR[:] = f32(0.0)
            for r in range(count):
                for i in range(SIZE):
                    x_SR[i, r] = x_NK[first + r, b * SIZE + i]
            for r in range(ROWS):
                amax_R[r] = f32(0.0)
                for i in range(SIZE):
                    amax_R[r] = max(amax_R[r], abs(x_SR[i, r]))
                start_R[r] = _nearest_code(amax_R[r] / (f32(6.0) * scale_2))
                best_R[r], found_R[r] = f32(np.inf), NUM_SCALES + 1
            for direction in (-1, 1):
                for step in range(max(direction, 0), NUM_SCALES):
                    for r in range(ROWS):
                        code_R[r] = min(max(start_R[r] + direction * step, 1), NUM_SCALES)
                    _try(
                        code_R, scale_2, x_SR, factor_SS, is_full, scale_R, e_SR, part_R, loss_R,
                        best_R, found_R,
                    )  # fmt: skip
                    is_last = True
                    for r in range(count):
                        is_last &= code_R[r] == (1 if direction < 0 else NUM_SCALES)
                    if is_last or not _can_improve(
                        direction, x_SR, scale_R, bound_B2S[b], part_R, loss_R, best_R, amax_R
                    ):
                        break
            for r in range(count):
                found_NB[first + r, b] = u8(found_R[r] if amax_R[r] > 0 else CODE_OF_ONE)


@njit(
    "void(float32[:, ::1], float32[::1], float32[:, ::1], float32[:, ::1], float32[::1])",
    nogil=True,
    cache=True,
    error_model="numpy",
)
def _descend(
    x_NS: Array, divisor_N: Array, measure_SS: Array, value_NS: Array, loss_N: Array
) -> None:
    slope_S = np.empty(SIZE, f32)
    for n in range(divisor_N.size):
        x_S, value_S, divisor = x_NS[n], value_NS[n], divisor_N[n]
        slope_S[:] = f32(0.0)
        for i in range(SIZE):
            value_S[i] = _nearest(x_S[i] / divisor) * divisor
            _add_row(slope_S, value_S[i] - x_S[i], measure_SS, i)
        for _ in range(SWEEPS):
            for i in range(SIZE):
                best = value_S[i] - slope_S[i] / measure_SS[i, i]
                best = _nearest(best / divisor) * divisor
                if best != value_S[i]:
                    _add_row(slope_S, best - value_S[i], measure_SS, i)
                    value_S[i] = best
        loss = f32(0.0)
        for i in range(SIZE):
            loss += slope_S[i] * (value_S[i] - x_S[i])
        loss_N[n] = loss


@njit(
    "void(float32[:, ::1], float32[:, ::1], uint8[:, ::1])",
    nogil=True,
    cache=True,
    error_model="numpy",
)
def _round_to(x_NK: Array, divisor_NB: Array, packed_NP: Array) -> None:
    for n in range(divisor_NB.shape[0]):
        for b in range(divisor_NB.shape[1]):
            divisor = divisor_NB[n, b]
            for p in range(b * SIZE // 2, (b + 1) * SIZE // 2):
                low, high = x_NK[n, 2 * p] / divisor, x_NK[n, 2 * p + 1] / divisor
                packed_NP[n, p] = u8(_encode(high) << u32(4) | _encode(low))
