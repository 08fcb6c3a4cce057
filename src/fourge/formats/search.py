"""Which E4M3 scale of a block makes its NVFP4 values lie nearest, under a given measure of error.

    value = e2m1(x / s) * s        s = scale * weight_scale_2, for each of the 126 positive scales
    error = sum_j (sum_i F[i, j] (value - x)_i)^2

F is a factor of the block's measure H = F F^T: of E[x x^T] over the inputs that the block is
multiplied with, error is then what it adds to the squared output ("local Hessian"). A diagonal
F, given as a vector, weighs columns by themselves; ones make it the plain squared error. Of equal
errors the smaller scale counts. ``max`` would take amax / 6 of every block.

Every operation is one IEEE float32 operation and the order of sums is fixed, so that kernels find
the same scales bit for bit. Knows no file and no model.

Shape suffixes: N rows, K columns, B = K / 16 blocks of a row, S = 16.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fourge.formats import e2m1, fp8
from fourge.formats.layout import BLOCK_SIZE, scale_shape
from fourge.formats.nvfp4 import NVFP4Tensor

NUM_SCALES = 126
SWEEPS = 2
# A block of zeros is as good with any scale; ``max`` gives it this one.
SCALE_OF_ZEROS = 1.0


class Descended(NamedTuple):
    """What ``descend`` finds."""

    value_NS: Tensor  # float32, codes times divisors
    loss_N: Tensor  # float32, e^T H e


def search_scales(x: Tensor, scale_2: Tensor, factor: Tensor) -> Tensor:
    """float8_e4m3fn [N, B]: the best block scales for x (float32 [N, K]) with weight_scale_2.

    factor: float32 [B, 16, 16], lower triangular, or [B, 16], a diagonal. ValueError: a dtype or
    shape that does not fit.
    """
    check_search(x, factor)
    x_NBS = x.unflatten(-1, (-1, BLOCK_SIZE))
    best_NB = torch.full(x_NBS.shape[:2], torch.inf, device=x.device)
    found_NB = torch.where(x_NBS.abs().amax(-1) > 0, fp8.SMALLEST, SCALE_OF_ZEROS)
    for scale in positive_scales(x.device):
        divisor = scale * scale_2
        error_NBS = e2m1.decode(e2m1.encode(x_NBS / divisor)) * divisor - x_NBS
        loss_NB = measure(error_NBS, factor)
        is_better_NB = (loss_NB < best_NB) & (x_NBS.abs().amax(-1) > 0)
        best_NB = torch.where(is_better_NB, loss_NB, best_NB)
        found_NB = torch.where(is_better_NB, scale, found_NB)
    return fp8.to_e4m3(found_NB)


def measure(error_NBS: Tensor, factor: Tensor) -> Tensor:
    """float32 [N, B]: sum_j (sum_i F[i, j] error_i)^2, over i ascending, over j descending."""
    loss_NB = torch.zeros_like(error_NBS[..., 0])
    for j in reversed(range(BLOCK_SIZE)):
        if factor.dim() == 2:
            part_NB = factor[:, j] * error_NBS[..., j]
        else:
            part_NB = factor[:, j, j] * error_NBS[..., j]
            for i in range(j + 1, BLOCK_SIZE):
                part_NB = part_NB + factor[:, i, j] * error_NBS[..., i]
        loss_NB = loss_NB + part_NB * part_NB
    return loss_NB


def round_to(x: Tensor, weight_scale: Tensor, scale_2: Tensor) -> NVFP4Tensor:
    """x (float32 [N, K]) with given scales (float8_e4m3fn [N, B], float32 []): nearest codes."""
    divisor_NB = fp8.from_e4m3(weight_scale) * scale_2
    x_NBS = x.unflatten(-1, (-1, BLOCK_SIZE))
    codes_NK = e2m1.encode(x_NBS / divisor_NB.unsqueeze(-1)).flatten(-2)
    return NVFP4Tensor(e2m1.pack(codes_NK), weight_scale, scale_2)


def descend(x: Tensor, weight_scale: Tensor, scale_2: Tensor, measure_SS: Tensor) -> Descended:
    """Codes of one block column for x (float32 [N, 16]) that lower e^T H e, e = value - x, from
    where rounding to nearest leaves it: coordinate descent, each code in turn the best there is
    while the other fifteen stay, ``SWEEPS`` times over. It never rises.

    weight_scale: float8_e4m3fn [N]; measure_SS: H, float32, with a positive diagonal.
    """
    divisor_N = fp8.from_e4m3(weight_scale) * scale_2
    value_NS = _nearest(x / divisor_N[:, None]) * divisor_N[:, None]
    slope_NS = torch.zeros_like(x)
    for i in range(BLOCK_SIZE):
        slope_NS = slope_NS + (value_NS[:, i] - x[:, i])[:, None] * measure_SS[i]
    for _ in range(SWEEPS):
        for i in range(BLOCK_SIZE):
            best_N = value_NS[:, i] - slope_NS[:, i] / measure_SS[i, i]
            best_N = _nearest(best_N / divisor_N) * divisor_N
            change_N = best_N - value_NS[:, i]
            slope_NS = slope_NS + change_N[:, None] * measure_SS[i]
            value_NS[:, i] = best_N
    loss_N = torch.zeros_like(divisor_N)
    for i in range(BLOCK_SIZE):
        loss_N = loss_N + slope_NS[:, i] * (value_NS[:, i] - x[:, i])
    return Descended(value_NS, loss_N)


def _nearest(x: Tensor) -> Tensor:
    return e2m1.decode(e2m1.encode(x))


def positive_scales(device: torch.device) -> Tensor:
    """float32 [126]: all positive finite E4M3 numbers, ascending."""
    codes = torch.arange(1, NUM_SCALES + 1, dtype=torch.uint8, device=device)
    return fp8.from_e4m3(codes.view(torch.float8_e4m3fn))


def check_search(x: Tensor, factor: Tensor) -> None:
    """Check the arguments of search_scales. Shared with the kernels."""
    if x.dtype != torch.float32 or x.dim() != 2:
        raise ValueError(f"x must be float32 [N, K]; got {x.dtype} {tuple(x.shape)}")
    num_blocks = scale_shape(x.shape)[1]
    shapes = ((num_blocks, BLOCK_SIZE), (num_blocks, BLOCK_SIZE, BLOCK_SIZE))
    if factor.dtype != torch.float32 or factor.shape not in shapes:
        raise ValueError(
            f"factor must be float32 {shapes[0]} or {shapes[1]}; got {factor.dtype}"
            f" {tuple(factor.shape)}"
        )
