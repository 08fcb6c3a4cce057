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


def tensor_scales(expert: Expert, amax_range: float = nvfp4.AMAX_RANGE) -> dict[str, torch.Tensor]:
    """``weight_scale_2`` of each projection: amax / amax_range, float32 [].

    gate and up share one, from the larger of their amax, because engines apply the gate's to both
    (vllm 0.33.0 modelopt.py:1055-1063). CheckpointError: a weight is NaN or infinite.
    """
    gate, up, down = (
        _amax(f"{expert.prefix}{name}.weight", weight)
        for name, weight in zip(Expert._fields[1:], expert[1:], strict=True)
    )
    gate_up_scale = nvfp4.weight_scale_2(max(gate, up), amax_range)
    return {
        "gate_proj": gate_up_scale,
        "up_proj": gate_up_scale,
        "down_proj": nvfp4.weight_scale_2(down, amax_range),
    }


def _amax(name: str, weight: torch.Tensor) -> float:
    amax = kernels.amax(weight)
    if not math.isfinite(amax):
        raise not_finite(name)
    return amax
