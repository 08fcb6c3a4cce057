"""What quantizing holds in memory besides weights: the terms of layerwise/budget.py's sum.

Imports no torch.
"""

from dataclasses import dataclass

from fourge.layerwise.budget import COPY_BUFFER_BYTES, Budget, Needs, embedding_bytes
from fourge.models.config import ModelConfig
from fourge.models.footprint import Load, compute_bytes
from fourge.quantize.fitting import Fitting


@dataclass(frozen=True)
class Workload:
    """How many tokens, in how many passes, and how large the pieces are that are computed."""

    tokens: int
    passes: int
    load: Load
    workers: int  # threads that quantize experts
    fitting: Fitting


def needs(config: ModelConfig, workload: Workload, budget: Budget) -> Needs:
    """Buffers and temporaries of a run; statistics lie where the computation is."""
    statistics = statistics_bytes(config, workload.passes)
    buffers = _buffers(config, workload, statistics)
    compute = compute_bytes(config, workload.load, itemsize=budget.itemsize)
    fitting = workload.fitting.layer_bytes(config, itemsize=budget.itemsize)
    # Tokens have all been through a group when its experts are quantized.
    scratch = workload.workers * workload.fitting.scratch_bytes(config, itemsize=budget.itemsize)
    compute = max(compute, scratch) + fitting
    return Needs(
        host=buffers,
        compute=compute + statistics if budget.on_device else compute,
        at_start=buffers + embedding_bytes(config, workload.tokens, workload.load),
        rows=3 * workload.load.batch_tokens * config.hidden_size * 4,
    )


def statistics_bytes(config: ModelConfig, passes: int) -> int:
    """What calibrate/observe.py keeps of one layer."""
    channels = config.hidden_size + config.moe_intermediate_size
    return config.n_routed_experts * (passes * (channels * 4 + 16) + 8)


def _buffers(config: ModelConfig, workload: Workload, statistics: int) -> int:
    """Tokens, the copy buffer, statistics and their serialized form, quantized experts."""
    quantized = config.hidden_size * config.moe_intermediate_size  # at most a byte per weight
    return (
        workload.tokens * 4
        + max(COPY_BUFFER_BYTES, 2 * config.hidden_size * 2)
        + 3 * statistics
        + workload.workers * 2 * quantized
    )
