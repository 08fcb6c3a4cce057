"""Scales by search: of all 126, the one whose values have the least error, block by block.

    mse             sum of e_i^2
    weighted-mse    sum of E[x_i^2] e_i^2          what each column's input makes of the error
    local-hessian   e^T E[x x^T] e of the block    and of the 16 columns together

weight_scale_2 is amax / (6 * 448), or amax / (6 * 256), which leaves the largest blocks room for
scales above amax / 6; whichever has the less error in all. (MSE sweep and local Hessians as in
nvidia-modelopt 0.47, there without routing weights, prior and choice of range.)
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fourge.calibrate.moments import Measures
from fourge.formats import kernels, nvfp4
from fourge.formats.layout import BLOCK_SIZE
from fourge.models import chunks
from fourge.quantize.methods.expert import POOLS, ROOMY_RANGE, Expert, Quantized, pool_amax

AMAX_RANGES = (nvfp4.AMAX_RANGE, ROOMY_RANGE)
# Of the mean of a block's diagonal, added to it: the usual share of GPTQ (Frantar et al., arXiv
# 2210.17323). Beside a column of huge inputs the others would count for nothing.
DAMPING = 0.01


class Scales(NamedTuple):
    """What is divided by, of one projection."""

    scale_NB: torch.Tensor
    scale_2: torch.Tensor


def quantize_expert(expert: Expert, measures: Measures) -> Quantized:
    """With the error that ``measures`` make: none, the diagonal, or blocks. CheckpointError if a
    weight is NaN or infinite.
    """
    factors = []
    for pool, measure in zip(POOLS, measures, strict=True):
        weight = getattr(expert, pool[0])
        ones = torch.ones(weight.shape[1] // BLOCK_SIZE, BLOCK_SIZE, device=weight.device)
        factors.append(_factor(measure) if measure.numel() else ones)
    return {
        name: kernels.round_to(getattr(expert, name).float(), *scales)
        for name, scales in search_expert(expert, factors).items()
    }


def search_expert(expert: Expert, factors: Sequence[torch.Tensor]) -> dict[str, Scales]:
    """The best scales by measures of the input of gate and up, and of down."""
    found = {}
    for pool, amax, factor in zip(POOLS, pool_amax(expert), factors, strict=True):
        weights = [getattr(expert, name).float() for name in pool]
        tried = []
        for amax_range in AMAX_RANGES:
            scale_2 = nvfp4.weight_scale_2(amax, amax_range).to(factor.device)
            scales = [
                Scales(kernels.search_scales(x_NK, scale_2, factor), scale_2) for x_NK in weights
            ]
            errors = [_error(*one, factor) for one in zip(weights, scales, strict=True)]
            tried.append((sum(errors), scales))
        least = min(tried, key=lambda one: one[0])
        found |= dict(zip(pool, least[1], strict=True))
    return found


def _error(x_NK: torch.Tensor, scales: Scales, factor: torch.Tensor) -> float:
    """Of all blocks together."""
    total = 0.0
    for rows in chunks.slices(len(x_NK), chunks.ROWS):
        q = kernels.round_to(x_NK[rows], scales.scale_NB[rows], scales.scale_2)
        e_NBS = (kernels.dequantize(q) - x_NK[rows]).unflatten(-1, (-1, BLOCK_SIZE))
        if factor.dim() == 2:
            e_NBS *= factor
        else:
            e_NBS = (e_NBS.transpose(0, 1) @ factor).transpose(0, 1)
        total += float(e_NBS.square().sum(dtype=torch.float64))
    return total


def factor_of(block_BSS: torch.Tensor) -> torch.Tensor:
    """float32 [B, 16, 16], lower triangular: F F^T = block + damping."""
    block_BSS = block_BSS.double()
    mean_B = block_BSS.diagonal(dim1=-2, dim2=-1).mean(-1)
    # What is never anything but zero is as good with any error: plain squares.
    damping_B11 = torch.where(mean_B > 0, DAMPING * mean_B, 1.0)[:, None, None]
    identity = torch.eye(BLOCK_SIZE, dtype=torch.float64, device=block_BSS.device)
    # A moment has no negative eigenvalue but by the rounding of its sums, far below the damping.
    return torch.linalg.cholesky(block_BSS + damping_B11 * identity).float()


def _factor(measure: torch.Tensor) -> torch.Tensor:
    if measure.dim() == 3:
        return factor_of(measure)
    measure_BS = measure.unflatten(0, (-1, BLOCK_SIZE))
    mean_B1 = measure_BS.mean(-1, keepdim=True)
    return (measure_BS + torch.where(mean_B1 > 0, DAMPING * mean_B1, 1.0)).sqrt()
