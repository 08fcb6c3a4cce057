"""What was asked for, and what was decided: the values that a launch is planned with."""

from dataclasses import dataclass

from fourge.launch.hardware import Hardware
from fourge.launch.memory import Load, Memory, Parallel
from fourge.launch.served import Served

ENGINES = ("vllm", "sglang")
PROFILES = ("latency", "throughput", "agentic-safe")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What was asked for; None leaves the choice to the planner."""

    engine: str
    hardware: Hardware
    profile: str = "latency"
    context: int | None = None
    mtp: bool | None = None
    pattern: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One decision, in one line."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A launch that fits. ``kv`` is "fp8" or "bf16"; ``choices`` say why."""

    request: Request
    served: Served
    parallel: Parallel
    load: Load
    kv: str
    memory: Memory
    context: int
    choices: tuple[Choice, ...]
    warnings: tuple[str, ...]

    @property
    def engine(self) -> str:
        return self.request.engine

    @property
    def hardware(self) -> Hardware:
        return self.request.hardware

    @property
    def family(self) -> int:
        return self.request.hardware.gpu.family

    @property
    def gpus_per_host(self) -> int:
        """GPUs of each host that take part."""
        return min(self.hardware.per_host, self.parallel.gpus // self.parallel.pipeline)

    @property
    def tokens(self) -> int:
        """Tokens in all caches: replicas of data-parallel attention have one each."""
        return self.memory.tokens * self.parallel.data
