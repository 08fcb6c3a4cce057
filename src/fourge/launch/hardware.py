"""Machines: what --hardware names, or what NVML finds here.

A GPU is a file of gpus/; a machine is ``8xh200``, ``2x8xh200`` (two hosts) or a name alone for one
GPU. Several DGX Sparks are several hosts, since each has one GPU.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from fourge.errors import LaunchError

GPUS = Path(__file__).parent / "gpus"
MACHINES = Path(__file__).parent / "machines.toml"
MIB = 1 << 20
_NAME = re.compile(r"(?:(?:(?P<hosts>\d+)x)?(?P<count>\d+)x)?(?P<gpu>[a-z][a-z0-9-]*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One kind of GPU. ``architecture`` is its compute capability without the dot (SM120 is 120).

    By engine: ``utilization``, the share of the memory that it may take (without one, what it
    chooses itself), ``sequences`` and ``chunk`` (tokens of one prefill step) of a full load.
    """

    name: str
    title: str
    architecture: int
    memory: int  # bytes, as nvidia-smi reports them
    link: str  # "pcie", "nvlink" or "unified" (one GPU, whose memory is the host's)
    utilization: Mapping[str, float]
    sequences: Mapping[str, int]
    chunk: Mapping[str, int]
    nvml: tuple[str, ...] = ()

    @property
    def family(self) -> int:
        """90 Hopper, 100 data-centre Blackwell (SM10x), 120 workstation Blackwell (SM12x)."""
        return self.architecture // 10 * 10


@dataclass(frozen=True, slots=True)
class Hardware:
    """``hosts`` hosts with ``per_host`` GPUs of one kind each."""

    gpu: Gpu
    per_host: int
    hosts: int = 1

    @property
    def gpus(self) -> int:
        return self.per_host * self.hosts

    @property
    def name(self) -> str:
        if self.gpu.link == "unified":
            return self.gpu.name if self.hosts == 1 else f"{self.hosts}x{self.gpu.name}"
        count = f"{self.per_host}x{self.gpu.name}"
        return count if self.hosts == 1 else f"{self.hosts}x{count}"


@cache
def gpus() -> dict[str, Gpu]:
    """Every kind of GPU that fourge has a file of, by name."""
    found = {}
    for path in sorted(GPUS.glob("*.toml")):
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        memory = raw.pop("memory_mib") * MIB
        nvml = tuple(raw.pop("nvml"))
        found[path.stem] = Gpu(name=path.stem, memory=memory, nvml=nvml, **raw)
    return found


@cache
def machines() -> tuple[Hardware, ...]:
    """The machines that are proposed where a model does not fit."""
    return tuple(map(parse, tomllib.loads(MACHINES.read_text(encoding="utf-8"))["names"]))


def parse(name: str) -> Hardware:
    """``8xrtx-pro-6000``, ``2x8xh200``, ``dgx-spark``. Raises LaunchError."""
    match = _NAME.fullmatch(name.strip().lower())
    gpu = gpus().get(match["gpu"]) if match else None
    count = int(match["count"] or 1) if match else 0
    hosts = int(match["hosts"] or 1) if match else 0
    if gpu is None or count < 1 or hosts < 1:
        raise LaunchError(
            f"--hardware {name} is not known; write COUNTxGPU, HOSTSxCOUNTxGPU or auto, with one of"
            f" the GPUs {', '.join(gpus())}."
        )
    if gpu.link == "unified":
        return Hardware(gpu, 1, hosts * count)
    return Hardware(gpu, count, hosts)


def detect() -> Hardware:
    """The GPUs of this host, through NVML. Raises LaunchError where there are none, or of several
    kinds.
    """
    found = _nvml_gpus()
    kinds = {(name, memory, architecture) for name, memory, architecture in found}
    if len(kinds) != 1:
        listed = ", ".join(f"{name} ({memory // MIB} MiB)" for name, memory, _ in sorted(kinds))
        raise LaunchError(
            f"--hardware auto found {listed or 'no NVIDIA GPU'} on this host; needed are GPUs of"
            " one kind: name the machine with --hardware, for example 8xrtx-pro-6000."
        )
    return Hardware(recognise(*kinds.pop()), len(found))


def recognise(name: str, memory: int, architecture: int) -> Gpu:
    """The kind of GPU that NVML calls ``name``; an unknown one is planned for by its figures."""
    by_length = sorted(gpus().values(), key=lambda gpu: -max(map(len, gpu.nvml)))
    for gpu in by_length:
        if gpu.architecture == architecture and any(part in name for part in gpu.nvml):
            return replace(gpu, memory=memory)
    return Gpu(
        name=re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        title=name,
        architecture=architecture,
        memory=memory,
        link="pcie",
        utilization={"vllm": 0.85},
        sequences={"vllm": 32, "sglang": 16},
        chunk={"vllm": 4096, "sglang": 4096},
    )


def _nvml_gpus() -> list[tuple[str, int, int]]:
    """Name, bytes of memory and architecture of every GPU."""
    import pynvml  # of nvidia-ml-py: only here, since it is of no use without a driver

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise LaunchError(
            f"--hardware auto needs an NVIDIA driver on this host ({error}); name the machine"
            " instead, for example --hardware 8xrtx-pro-6000."
        ) from None
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            memory = _memory(pynvml, handle)
            found.append((str(pynvml.nvmlDeviceGetName(handle)), memory, 10 * major + minor))
        return found
    finally:
        pynvml.nvmlShutdown()


def _memory(pynvml, handle) -> int:
    """Bytes of a GPU's memory; where it is the host's (GB10) NVML has no figure of its own."""
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except pynvml.NVMLError:
        import psutil

        return psutil.virtual_memory().total
