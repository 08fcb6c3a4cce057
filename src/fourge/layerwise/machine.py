"""What this machine computes with: device, dtype, and what the process holds before it begins."""

from pathlib import Path

import psutil
import torch

from fourge.errors import BudgetError
from fourge.formats import kernels
from fourge.formats.nvfp4 import weight_scale_2
from fourge.layerwise.budget import TYPICAL_GPU_BASE_BYTES, Budget, default_host_budget
from fourge.layerwise.progress import peak_resident

# Resident memory that threads, stacks and the allocator add once the run is under way.
SETTLING_BYTES = 64 << 20
# Part of the free device memory that is used when no budget is given.
DEVICE_SHARE = 0.9

CPU_FLAGS = Path("/proc/cpuinfo")


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one. BudgetError if a GPU is asked for and there is none."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise BudgetError(
            "--device cuda was asked for, but torch finds no CUDA device: install a CUDA build of"
            " torch, or use --device cpu."
        )
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is BF16, as engines compute, wherever the hardware multiplies it; else FP32."""
    if name == "float32":
        return torch.float32
    if name == "bfloat16" or device.type == "cuda":
        return torch.bfloat16
    flags = CPU_FLAGS.read_text()
    native = any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """``float32``."""
    return str(dtype).removeprefix("torch.")


def measure_budget(
    device: torch.device, *, memory: int | None, device_memory: int | None, itemsize: int
) -> Budget:
    """Limits in bytes (None: what the machine has free), and what the process holds by now."""
    _warm_up(device, torch.bfloat16 if itemsize == 2 else torch.float32)
    host = memory or default_host_budget()
    resident = psutil.Process().memory_info().rss + SETTLING_BYTES
    peak = peak_resident()
    if device.type == "cpu":
        return Budget(host, base=resident, peak=peak, itemsize=itemsize)
    free, total = torch.cuda.mem_get_info(device)
    limit = device_memory or memory or free
    limit = min(limit, int(free * DEVICE_SHARE))
    # Beyond the plan's estimate torch gives cached blocks back, and at this bound it refuses.
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    # CUDA libraries are loaded as the first layer needs them, so what is held now says too little.
    base = max(resident, TYPICAL_GPU_BASE_BYTES)
    return Budget(host, base=base, peak=peak, device=limit, itemsize=itemsize)


def device_bytes(*, peak: bool = False) -> int:
    """Bytes that torch holds, or has held at most, on the GPU; 0 where none is in use."""
    if not torch.cuda.is_initialized():
        return 0
    return torch.cuda.max_memory_reserved() if peak else torch.cuda.memory_reserved()


def measure(seconds: float) -> dict:
    """What a stage took, and the most that the process has held by now."""
    return {
        "seconds": round(seconds, 3),
        "peak_resident_bytes": peak_resident(),
        "peak_device_bytes": device_bytes(peak=True),
    }


def out_of_device_memory(error: torch.OutOfMemoryError) -> BudgetError:
    """The sentence for a GPU that turned out to be too small."""
    return BudgetError(
        f"the GPU ran out of memory ({str(error).splitlines()[0]}); finished layers are kept:"
        " run the same command with a smaller --device-memory, or free the GPU of others."
    )


def _warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Compile kernels and start thread pools, so that their memory is counted."""
    weights = torch.ones(16, 64, dtype=torch.bfloat16, device=device)
    kernels.quantize(weights, weight_scale_2(kernels.amax(weights)))
    square = torch.ones(256, 256, dtype=dtype, device=device)
    torch.mm(square, square)
