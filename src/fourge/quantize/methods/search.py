"""Scales by search: of all 126, the one whose values have the least error, block by block.

    mse             sum of e_i^2
    weighted-mse    sum of E[x_i^2] e_i^2          what each column's input makes of the error
    local-hessian   e^T E[x x^T] e of the block    and of the 16 columns together

(MSE sweep and local Hessians as in nvidia-modelopt 0.47, there without routing weights and prior.)
"""

import torch

from fourge.calibrate.moments import Measures
from fourge.formats import kernels
from fourge.formats.layout import BLOCK_SIZE
from fourge.formats.nvfp4 import NVFP4Tensor
from fourge.quantize.methods.expert import Expert, Quantized, tensor_scales

# Of the mean of a block's diagonal, added to it: the usual share of GPTQ (Frantar et al., arXiv
# 2210.17323). Beside a column of huge inputs the others would count for nothing.
DAMPING = 0.01


def quantize_expert(expert: Expert, measures: Measures) -> Quantized:
    """With the error that ``measures`` make: none, the diagonal, or blocks. CheckpointError if a
    weight is NaN or infinite.
    """
    scales, found = tensor_scales(expert), {}
    factors = [_factor(one) for one in measures]
    for name, factor in zip(scales, (factors[0], *factors), strict=True):
        x_NK = getattr(expert, name).float()
        if not factor.numel():
            factor = torch.ones(x_NK.shape[1] // BLOCK_SIZE, BLOCK_SIZE, device=x_NK.device)
        found[name] = _quantize(x_NK, scales[name], factor)
    return found


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


def _quantize(x_NK: torch.Tensor, scale_2: torch.Tensor, factor: torch.Tensor) -> NVFP4Tensor:
    scale_2 = scale_2.to(x_NK.device)
    return kernels.round_to(x_NK, kernels.search_scales(x_NK, scale_2, factor), scale_2)
