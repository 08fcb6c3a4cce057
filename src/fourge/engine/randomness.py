"""Random numbers that depend on (seed, position, purpose) alone.

So a request draws the same numbers in any batch, after any preemption, on any device. One number
decides one draw. splitmix64 (Steele, Lea, Flood 2014), three rounds; 53 bits of the last.
"""

from collections.abc import Sequence

import numpy as np
import torch

from fourge.engine.request import Request
from fourge.engine.transfers import to_device

# What a number is for, at one position.
CHOOSE, ACCEPT, DRAFT = range(3)

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def uniform(
    seeds: np.ndarray, positions: np.ndarray, purpose: int, device: torch.device
) -> torch.Tensor:
    """float64 in [0, 1), of the broadcast shape of two int64 arrays."""
    state = _mix(seeds.astype(np.int64).view(np.uint64))
    state = _mix(state ^ positions.astype(np.int64).view(np.uint64))
    bits = _mix(state ^ np.uint64(purpose))
    return to_device((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53, device)


def seeds_of(requests: Sequence[Request]) -> np.ndarray:
    """int64 [B]."""
    return np.array([request.seed for request in requests], dtype=np.int64)


def draw(probs_NV: torch.Tensor, u_N: torch.Tensor) -> torch.Tensor:
    """int64 [N]: the token at which the cumulated weights of a row pass u times their sum. Rows
    need not add up to 1; a token of weight 0 is never drawn.
    """
    cumulated_NV = probs_NV.double().cumsum(-1)
    total_N1 = cumulated_NV[:, -1:].contiguous()
    drawn_N1 = torch.searchsorted(cumulated_NV, u_N.to(total_N1)[:, None] * total_N1, right=True)
    last_N1 = torch.searchsorted(cumulated_NV, total_N1)  # rounding may lead beyond it
    return torch.minimum(drawn_N1, last_N1).squeeze(-1)


def _mix(value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        value = value + _STEP
        value = (value ^ (value >> np.uint64(30))) * _FIRST
        value = (value ^ (value >> np.uint64(27))) * _SECOND
    return value ^ (value >> np.uint64(31))
