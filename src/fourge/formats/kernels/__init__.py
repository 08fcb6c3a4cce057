"""The fast path of nvfp4.py and search.py: the same functions, bit for bit, on the device where the
tensors lie.

CPU tensors go to cpu.py and cpu_search.py (numba, one core, releases the GIL), CUDA tensors to
gpu.py and gpu_search.py (Triton); what torch itself does fast enough there, and other devices, to
lookup.py.
"""

import torch
from torch import Tensor

from fourge.formats.kernels import cpu, cpu_search, lookup
from fourge.formats.nvfp4 import ErrorSums, NVFP4Tensor
from fourge.formats.nvfp4 import compare as _compare
from fourge.formats.nvfp4 import count_scales as _count_scales
from fourge.formats.nvfp4 import quantize_activations as _quantize_activations
from fourge.formats.search import Descended
from fourge.formats.search import round_to as _round_to


def amax(w: Tensor) -> float:
    """As nvfp4.amax. ValueError also: a device other than cpu and cuda."""
    if _on_cuda(w):
        from fourge.formats.kernels import gpu

        return gpu.amax(w)
    return cpu.amax(w)


def quantize(w: Tensor, scale_2: Tensor, out: NVFP4Tensor | None = None) -> NVFP4Tensor:
    """As nvfp4.quantize. ValueError also: a device other than cpu and cuda."""
    if _on_cuda(w):
        from fourge.formats.kernels import gpu

        return gpu.quantize(w, scale_2, out)
    return cpu.quantize(w, scale_2, out)


def dequantize(
    q: NVFP4Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """As nvfp4.dequantize, on any device."""
    if q.weight.device.type == "cpu":
        return cpu.dequantize(q, dtype, out)
    return lookup.dequantize(q, dtype, out)


def quantize_activations(x: Tensor, input_scale: Tensor) -> Tensor:
    """As nvfp4.quantize_activations, on any device."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16):
        return cpu.quantize_activations(x, input_scale)
    return _quantize_activations(x, input_scale)


def compare(w: Tensor, q: NVFP4Tensor) -> ErrorSums:
    """As nvfp4.compare, to the rounding of float64 sums."""
    return cpu.compare(w, q) if w.device.type == "cpu" else _compare(w, q)


def count_scales(weight_scale: Tensor) -> list[int]:
    """As nvfp4.count_scales, on any device."""
    on_cpu = weight_scale.device.type == "cpu"
    return cpu.count_scales(weight_scale) if on_cpu else _count_scales(weight_scale)


def search_scales(x: Tensor, scale_2: Tensor, factor: Tensor) -> Tensor:
    """As search.search_scales. ValueError also: a device other than cpu and cuda."""
    if _on_cuda(x):
        from fourge.formats.kernels import gpu_search

        return gpu_search.search_scales(x, scale_2, factor)
    return cpu_search.search_scales(x, scale_2, factor)


def descend(x: Tensor, weight_scale: Tensor, scale_2: Tensor, measure_SS: Tensor) -> Descended:
    """As search.descend. ValueError also: a device other than cpu and cuda."""
    if _on_cuda(x):
        from fourge.formats.kernels import gpu_search

        return gpu_search.descend(x, weight_scale, scale_2, measure_SS)
    return cpu_search.descend(x, weight_scale, scale_2, measure_SS)


def round_to(x: Tensor, weight_scale: Tensor, scale_2: Tensor) -> NVFP4Tensor:
    """As search.round_to, on any device."""
    on_cpu = x.device.type == "cpu"
    return (cpu_search.round_to if on_cpu else _round_to)(x, weight_scale, scale_2)


def _on_cuda(w: Tensor) -> bool:
    if w.device.type not in ("cpu", "cuda"):
        raise ValueError(f"weights must lie on cpu or cuda; got {w.device}")
    return w.device.type == "cuda"
