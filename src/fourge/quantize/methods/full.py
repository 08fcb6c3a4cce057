"""A full second moment as methods need it: damped, with what belongs to its blocks."""

from typing import NamedTuple

import torch

from fourge.calibrate.kinds import Kind
from fourge.calibrate.moments import reduced
from fourge.quantize.methods.search import DAMPING, factor_of


class Full(NamedTuple):
    """float32; B = K / 16 blocks on the diagonal, S = 16."""

    measure_KK: torch.Tensor
    factor_BSS: torch.Tensor
    inverse_BSS: torch.Tensor


def full_measure(moment_KK: torch.Tensor) -> Full:
    """Damped, against errors along directions in which inputs hardly ever lie; the identity where
    nothing was seen. ``moment_KK`` is changed.
    """
    diagonal = moment_KK.diagonal()
    mean = diagonal.mean()
    diagonal += torch.where(mean > 0, DAMPING * mean, 1.0)
    block_BSS = reduced(moment_KK, Kind.BLOCKS)
    inverse_BSS = torch.linalg.inv(block_BSS.double()).float()
    return Full(moment_KK, factor_of(block_BSS), inverse_BSS)


def inverse_factor(measure_KK: torch.Tensor) -> torch.Tensor:
    """float32 [K, K], upper triangular U: H^-1 = U^T U. Damps ``measure_KK`` more where float32 is
    not enough.
    """
    inverse_KK = torch.cholesky_inverse(_cholesky(measure_KK, upper=False))
    return _cholesky(inverse_KK, upper=True)


def _cholesky(matrix_KK: torch.Tensor, *, upper: bool) -> torch.Tensor:
    damping = DAMPING
    while True:
        factor_KK, failed = torch.linalg.cholesky_ex(matrix_KK, upper=upper)
        if not failed:
            return factor_KK
        matrix_KK.diagonal().add_(damping * matrix_KK.diagonal().mean())
        damping *= 10
