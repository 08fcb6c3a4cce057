"""The fast path of nvfp4.py: the same functions, bit for bit, on the device where the weight lies.

CPU tensors go to cpu.py (numba, one core, releases the GIL), CUDA tensors to gpu.py (Triton).
"""

from torch import Tensor

from fourge.formats.kernels import cpu
from fourge.formats.nvfp4 import NVFP4Tensor


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


def _on_cuda(w: Tensor) -> bool:
    if w.device.type not in ("cpu", "cuda"):
        raise ValueError(f"weights must lie on cpu or cuda; got {w.device}")
    return w.device.type == "cuda"
