"""What every method takes and gives: the three projections of one routed expert."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from fourge.calibrate.moments import Measures
from fourge.checkpoint.source import not_finite
from fourge.formats import kernels, nvfp4
from fourge.formats.nvfp4 import NVFP4Tensor


class Expert(NamedTuple):
    """BF16 weights [out, in] of one expert, and the name prefix for messages."""

    prefix: str
    gate_proj: torch.Tensor
    up_proj: torch.Tensor
    down_proj: torch.Tensor


Quantized = dict[str, NVFP4Tensor]  # by projection: gate_proj, up_proj, down_proj


class Method(NamedTuple):
    """What it makes is held against its ``rivals`` on held-out tokens, and the best is taken."""

    quantize: Callable[[Expert, Measures], Quantized]
    rivals: tuple[str, ...] = ()


# Projections that share one weight_scale_2: engines apply the gate's to up as well (vllm 0.33.0
# modelopt.py:1055-1063).
POOLS = (("gate_proj", "up_proj"), ("down_proj",))

# The largest magnitude at a weight_scale_2 of 1 that leaves block scales room above amax / 6: 1.5
# times the largest, 384, is an E4M3 number.
ROOMY_RANGE = 6 * 256.0


def pool_amax(expert: Expert) -> tuple[float, ...]:
    """The largest magnitude of each pool. CheckpointError: a weight is NaN or infinite."""
    return tuple(
        max(_amax(f"{expert.prefix}{name}.weight", getattr(expert, name)) for name in pool)
        for pool in POOLS
    )


def tensor_scales(expert: Expert, amax_range: float = nvfp4.AMAX_RANGE) -> dict[str, torch.Tensor]:
    """``weight_scale_2`` of each projection: amax of its pool / amax_range, float32 []."""
    return {
        name: nvfp4.weight_scale_2(amax, amax_range)
        for pool, amax in zip(POOLS, pool_amax(expert), strict=True)
        for name in pool
    }


def _amax(name: str, weight: torch.Tensor) -> float:
    amax = kernels.amax(weight)
    if not math.isfinite(amax):
        raise not_finite(name)
    return amax
