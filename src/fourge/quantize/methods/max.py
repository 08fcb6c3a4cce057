"""``max``: scales from the largest magnitude, bit-exact with nvidia-modelopt 0.47.

gate and up share one ``weight_scale_2``, from the larger of their amax, because engines apply the
gate's to both (vllm 0.33.0 modelopt.py:1055-1063). Depends on the weights alone.
"""

import math
from collections.abc import Iterator

import torch

from fourge.checkpoint.source import not_finite
from fourge.formats import kernels, nvfp4
from fourge.formats.nvfp4 import NVFP4Tensor
from fourge.quantize.methods.expert import Expert


def quantize_expert(expert: Expert) -> Iterator[tuple[str, NVFP4Tensor]]:
    """Quantize gate, up, down; CheckpointError if a weight is NaN or infinite."""
    amax_gate = _amax(expert.prefix + "gate_proj.weight", expert.gate_proj)
    amax_up = _amax(expert.prefix + "up_proj.weight", expert.up_proj)
    amax_down = _amax(expert.prefix + "down_proj.weight", expert.down_proj)
    gate_up_scale = nvfp4.weight_scale_2(max(amax_gate, amax_up))
    yield "gate_proj", kernels.quantize(expert.gate_proj, gate_up_scale)
    yield "up_proj", kernels.quantize(expert.up_proj, gate_up_scale)
    yield "down_proj", kernels.quantize(expert.down_proj, nvfp4.weight_scale_2(amax_down))


def _amax(name: str, weight: torch.Tensor) -> float:
    amax = kernels.amax(weight)
    if not math.isfinite(amax):
        raise not_finite(name)
    return amax
