"""The search for block scales on one CUDA device, in Triton; bit for bit search.py.

As in gpu.py, roundings are IEEE by construction, and products do not fuse with sums: kernels are
compiled with enable_fp_fusion off. Sums of 16 terms run in search.py's order, so they are kept as
columns of a tile and read one by one. All 126 scales are tried.
Runs on the current stream of x's device.

Suffixes: N rows of a tile, S = 16.
"""

# Triton may not be installed; where it is, its types are those of its compiler, not of kernels.
# pyright: reportMissingImports=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourge.formats.layout import scale_shape
from fourge.formats.search import (
    NUM_SCALES,
    SCALE_OF_ZEROS,
    SWEEPS,
    Descended,
    check_search,
    positive_scales,
)

# Rows per program: few, so that one column of blocks keeps all of a device's processors busy.
TILE, WARPS = 16, 1


def search_scales(x: Tensor, scale_2: Tensor, factor: Tensor) -> Tensor:
    """As search.search_scales; does not wait for the device."""
    check_search(x, factor)
    x, is_full = x.detach().contiguous(), factor.dim() == 3
    found = torch.empty(scale_shape(x.shape), dtype=torch.float32, device=x.device)
    num_rows, num_blocks = found.shape
    with torch.cuda.device_of(x):
        _search[(triton.cdiv(num_rows, TILE), num_blocks)](
            x, scale_2.to(x.device), factor.contiguous(), _scales(x.device), found,
            num_rows, num_blocks, IS_FULL=is_full, SCALES=NUM_SCALES, OF_ZEROS=SCALE_OF_ZEROS,
            TILE=TILE, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return found.to(torch.float8_e4m3fn)


def descend(x: Tensor, weight_scale: Tensor, scale_2: Tensor, measure_SS: Tensor) -> Descended:
    """As search.descend; does not wait for the device."""
    x, divisor_N = x.contiguous(), weight_scale.float() * scale_2
    found = Descended(torch.empty_like(x), torch.empty_like(divisor_N))
    with torch.cuda.device_of(x):
        _descend[(triton.cdiv(len(x), TILE),)](
            x, divisor_N, measure_SS.contiguous(), *found, len(x), SWEEPS=SWEEPS, TILE=TILE,
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return found


@cache
def _scales(device: torch.device) -> Tensor:
    return positive_scales(device)


@triton.jit
def _nearest(x):
    """e2m1 of a number; see cpu_search._nearest."""
    a = tl.abs(x)
    apart = tl.where(a < 2.0, 6291456.0, tl.where(a < 4.0, 12582912.0, 25165824.0))
    v = (x + apart) - apart
    return tl.minimum(tl.maximum(v, -6.0), 6.0)


@triton.jit
def _column(tile_NS, s, i):
    """Column i of a tile: zeros are added to it, which changes nothing."""
    return tl.sum(tl.where((s == i)[None, :], tile_NS, 0.0), axis=1)


@triton.jit
def _search(
    x, scale_2, factor, scales, found, num_rows, num_blocks,
    IS_FULL: tl.constexpr, SCALES: tl.constexpr, OF_ZEROS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    b, s = tl.program_id(1), tl.arange(0, 16)
    inside = n < num_rows
    places = n[:, None] * (num_blocks * 16) + b * 16 + s[None, :]
    x_NS = tl.load(x + places, mask=inside[:, None], other=0.0)
    is_zero = tl.max(tl.abs(x_NS), axis=1) == 0.0
    s2 = tl.load(scale_2)
    best_N = tl.full((TILE,), float("inf"), tl.float32)
    found_N = tl.zeros((TILE,), tl.float32)
    for code in range(SCALES):
        scale = tl.load(scales + code)
        divisor = scale * s2
        divisor_NS = tl.full((TILE, 16), 1.0, tl.float32) * divisor
        error_NS = _nearest(tl.div_rn(x_NS, divisor_NS)) * divisor - x_NS
        loss_N = tl.zeros((TILE,), tl.float32)
        if IS_FULL:
            # Column j of the sums; the factor is 0 above the diagonal, so i < j add nothing.
            part_NS = tl.zeros((TILE, 16), tl.float32)
            for i in tl.static_range(16):
                row_S = tl.load(factor + b * 256 + i * 16 + s)
                part_NS += _column(error_NS, s, i)[:, None] * row_S[None, :]
        else:
            part_NS = error_NS * tl.load(factor + b * 16 + s)[None, :]
        square_NS = part_NS * part_NS
        for j in tl.static_range(16):
            loss_N += _column(square_NS, s, 15 - j)
        is_better = loss_N < best_N
        best_N = tl.where(is_better, loss_N, best_N)
        found_N = tl.where(is_better, scale, found_N)
    found_N = tl.where(is_zero, OF_ZEROS, found_N)
    tl.store(found + n * num_blocks + b, found_N, mask=inside)


@triton.jit
def _descend(
    x, divisor, measure, value, loss, num_rows, SWEEPS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    s = tl.arange(0, 16)
    inside = n < num_rows
    places = n[:, None] * 16 + s[None, :]
    x_NS = tl.load(x + places, mask=inside[:, None], other=0.0)
    divisor_N = tl.load(divisor + n, mask=inside, other=1.0)
    divisor_NS = tl.broadcast_to(divisor_N[:, None], (TILE, 16))
    value_NS = _nearest(tl.div_rn(x_NS, divisor_NS)) * divisor_NS
    slope_NS = tl.zeros((TILE, 16), tl.float32)
    difference_NS = value_NS - x_NS
    for i in tl.static_range(16):
        row_S = tl.load(measure + i * 16 + s)
        slope_NS += _column(difference_NS, s, i)[:, None] * row_S[None, :]
    for _ in tl.static_range(SWEEPS):
        for i in tl.static_range(16):
            row_S = tl.load(measure + i * 16 + s)
            curve_N = tl.zeros((TILE,), tl.float32) + tl.load(measure + i * 17)
            old_N = _column(value_NS, s, i)
            new_N = old_N - tl.div_rn(_column(slope_NS, s, i), curve_N)
            new_N = _nearest(tl.div_rn(new_N, divisor_N)) * divisor_N
            slope_NS += (new_N - old_N)[:, None] * row_S[None, :]
            value_NS = tl.where((s == i)[None, :], new_N[:, None], value_NS)
    product_NS = slope_NS * (value_NS - x_NS)
    loss_N = tl.zeros((TILE,), tl.float32)
    for i in tl.static_range(16):
        loss_N += _column(product_NS, s, i)
    tl.store(value + places, value_NS, mask=inside[:, None])
    tl.store(loss + n, loss_N, mask=inside)
