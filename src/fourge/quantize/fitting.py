"""What methods keep of inputs and take while they quantize an expert, in bytes. Imports no torch.

The formulas are those of calibrate/moments.py and methods/; tests hold the peak of real runs
against the budgets that they lead to.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fourge.calibrate.kinds import LAYER_SAMPLE, MOST_HELD, Kind, moment_elements
from fourge.layerwise.budget import default_workers
from fourge.models.config import ModelConfig
from fourge.quantize.recipe import NEEDS

FLOAT32 = 4


@dataclass(frozen=True)
class Fitting:
    """What the methods of a run need to know of inputs."""

    methods: tuple[str, ...]

    @property
    def kind(self) -> Kind:
        """The most that any of them needs."""
        return max((NEEDS[name] for name in self.methods), key=list(Kind).index)

    @property
    def is_wanted(self) -> bool:
        """Whether any of them looks at inputs: ``max`` alone does not."""
        return any(name != "max" for name in self.methods)

    def expert_bytes(self, config: ModelConfig, *, itemsize: int) -> int:
        """What is kept of one expert of the group in memory; ``itemsize`` of the compute dtype."""
        if not self.is_wanted:
            return 0
        widths = (config.hidden_size, config.moe_intermediate_size)
        moments = FLOAT32 * sum(moment_elements(self.kind, width) for width in widths)
        # Rows that are kept, and those that they are picked from.
        return moments + 2 * MOST_HELD * (config.hidden_size * itemsize + FLOAT32)

    def layer_bytes(self, config: ModelConfig, *, itemsize: int) -> int:
        """What is kept of a layer besides."""
        if not self.is_wanted:
            return 0
        sample = 2 * 2 * LAYER_SAMPLE * config.hidden_size * itemsize
        return FLOAT32 * moment_elements(self.kind, config.hidden_size) + sample

    def scratch_bytes(self, config: ModelConfig, *, itemsize: int) -> int:
        """What one thread holds while it quantizes an expert."""
        if not self.is_wanted:
            return 0
        weights = config.hidden_size * config.moe_intermediate_size
        # The expert and one candidate, all projections, as the judge computes with them.
        judged = 2 * 3 * weights * itemsize + 2 * weights * len(self.methods)
        searched = 4 * weights * FLOAT32
        if self.kind != "full":
            return max(judged, searched)
        widest = max(config.hidden_size, config.moe_intermediate_size) ** 2
        # A moment and what it is drawn to, or its inverse and that one's factors.
        moments = 3 * widest * FLOAT32
        if any(name.endswith("+gptq") for name in self.methods):
            moments += 4 * widest * FLOAT32
        return max(judged, 2 * searched) + moments


def workers_for(methods: Sequence[str], *, on_device: bool) -> int:
    """Threads that quantize experts. On a GPU one is enough to keep it busy where methods search,
    and several would need their memory several times.
    """
    searches = any(name != "max" for name in methods)
    return 1 if on_device and searches else default_workers()
