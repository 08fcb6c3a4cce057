"""``local-hessian+gptq``: local-hessian's scales, codes by GPTQ (Frantar et al., arXiv 2210.17323).

Columns are rounded one after the other; the error of each is made up for in the columns that are
still to come, by H^-1 = U^T U:

    w_j -= (w_i - q_i) U_ij / U_ii        for all j > i

Scales stay as they are, columns keep their order.
"""

import torch

from fourge.calibrate.moments import Measures
from fourge.formats import e2m1, fp8, kernels
from fourge.formats.layout import BLOCK_SIZE
from fourge.formats.nvfp4 import NVFP4Tensor
from fourge.quantize.methods.expert import POOLS, Expert, Quantized
from fourge.quantize.methods.full import full_measure, inverse_factor
from fourge.quantize.methods.search import Scales, search_expert

# Errors reach columns beyond a panel in one product when it is done.
PANEL = 128


def quantize_expert(expert: Expert, measures: Measures) -> Quantized:
    """CheckpointError if a weight is NaN or infinite."""
    fulls, found = [full_measure(one) for one in measures], {}
    scales = search_expert(expert, [full.factor_BSS for full in fulls])
    for pool, full in zip(POOLS, fulls, strict=True):
        factor_KK = inverse_factor(full.measure_KK)
        for name in pool:
            found[name] = _quantize(getattr(expert, name), scales[name], factor_KK)
    return found


def _quantize(weight: torch.Tensor, scales: Scales, factor_KK: torch.Tensor) -> NVFP4Tensor:
    w_NK, (scale_NB, scale_2) = weight.float(), scales
    divisor_NB = fp8.from_e4m3(scale_NB) * scale_2
    for first in range(0, w_NK.shape[1], PANEL):
        stop = min(first + PANEL, w_NK.shape[1])
        error_NP = _round_panel(w_NK, divisor_NB, factor_KK, range(first, stop))
        w_NK[:, stop:].addmm_(error_NP, factor_KK[first:stop, stop:], alpha=-1)
    return kernels.round_to(w_NK, scale_NB, scale_2)


def _round_panel(
    w_NK: torch.Tensor, divisor_NB: torch.Tensor, factor_KK: torch.Tensor, columns: range
) -> torch.Tensor:
    """Round columns in place; their errors, over the factor's diagonal."""
    errors = []
    for column in columns:
        divisor_N = divisor_NB[:, column // BLOCK_SIZE]
        value_N = e2m1.decode(e2m1.encode(w_NK[:, column] / divisor_N)) * divisor_N
        error_N = (w_NK[:, column] - value_N) / factor_KK[column, column]
        w_NK[:, column] = value_N
        rest = slice(column + 1, columns.stop)
        w_NK[:, rest] -= error_N[:, None] * factor_KK[column, rest]
        errors.append(error_N)
    return torch.stack(errors, 1)
