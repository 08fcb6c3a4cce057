"""What a launch consists of: options with their reasons, environment, and one command per host."""

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fourge.launch.plan import Choice, Plan

MODELS = Path(__file__).with_name("models.toml")


@dataclass(frozen=True, slots=True)
class Option:
    """One option of an engine; ``value`` is None where it takes none."""

    flag: str
    value: str | None
    reason: str

    @property
    def words(self) -> list[str]:
        return [self.flag] if self.value is None else [self.flag, self.value]


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the server listens, and as what."""

    model_name: str
    host: str
    port: int
    api_key: str | None


@dataclass(frozen=True, slots=True)
class HostCommand:
    """What is run on one host: ``setup`` first; a host without a ``program`` only takes part."""

    host: str
    setup: tuple[tuple[str, ...], ...]
    program: tuple[str, ...]
    model: str
    options: tuple[Option, ...]
    environment: tuple[Variable, ...]

    @property
    def words(self) -> list[str]:
        """The command line of the engine."""
        return [*self.program, *(word for option in self.options for word in option.words)]


@cache
def family(model_type: str) -> dict[str, Any]:
    """The entry of models.toml."""
    return tomllib.loads(MODELS.read_text(encoding="utf-8"))[model_type]


def common_environment(plan: Plan) -> Iterator[Variable]:
    """What both engines leave to CUDA."""
    yield Variable("CUDA_DEVICE_ORDER", "PCI_BUS_ID", "GPUs are numbered as nvidia-smi does")
    yield Variable(
        "CUDA_VISIBLE_DEVICES",
        ",".join(map(str, range(plan.gpus_per_host))),
        "the GPUs of this plan",
    )
    if plan.hardware.gpu.family == 120:
        architecture = f"sm_{plan.hardware.gpu.architecture}a"
        yield Variable("CUTE_DSL_ARCH", architecture, "kernels are compiled for this GPU")


def sampling(plan: Plan) -> dict[str, float]:
    """Of generation_config.json, else what the publisher recommends."""
    return plan.served.sampling or family(plan.served.config.model_type).get("sampling", {})


def sampling_choice(plan: Plan) -> Choice:
    """What answers are sampled with where a request says nothing."""
    found = sampling(plan)
    value = ", ".join(f"{key} {number:g}" for key, number in found.items()) or "the engine's own"
    if plan.served.sampling:
        return Choice("sampling", value, "of the checkpoint's generation_config.json")
    reason = "the publisher's recommendation; the checkpoint has no generation_config.json"
    return Choice("sampling", value, reason if found else "nothing is recommended")


def host_names(plan: Plan, given: Sequence[str]) -> list[str]:
    """The hosts' names, or placeholders where none were given."""
    return list(given) or [f"host-{number}" for number in range(plan.hardware.hosts)]
