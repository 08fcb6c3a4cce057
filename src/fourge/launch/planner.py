"""Checkpoint, machine and profile -> a plan that fits, every choice with its reason.

The plan is the same for both engines but for what they differ in; vllm.py and sglang.py turn it
into options. What does not fit is refused with the figures and with what would fit.
"""

from dataclasses import replace

from fourge.errors import LaunchError
from fourge.launch import pattern as index_pattern
from fourge.launch.fitting import (
    check_architecture,
    check_context,
    check_mtp,
    fitting,
    kv_dtype,
    refusal,
)
from fourge.launch.plan import Plan, Request
from fourge.launch.reasons import choices, warnings
from fourge.launch.served import Served
from fourge.models.config import ModelConfig


def make_plan(served: Served, request: Request) -> Plan:
    """The plan; LaunchError if the model does not fit, or cannot run there at all."""
    if request.pattern is not None:
        kinds = index_pattern.layer_kinds(
            request.pattern, served.raw, served.config.num_hidden_layers
        )
        served = replace(served, config=replace(served.config, indexer_types=kinds))
    check_context(served, request)
    check_architecture(served, request)
    check_mtp(served, request)
    found = next(fitting(served, request), None)
    if found is None:
        raise LaunchError(refusal(served, request))
    parallel, load, memory = found
    context = request.context or _context(served.config, memory.tokens)
    plan = Plan(
        request=request,
        served=served,
        parallel=parallel,
        load=load,
        kv=kv_dtype(served.config),
        memory=memory,
        context=context,
        choices=(),
        warnings=(),
    )
    return replace(plan, choices=tuple(choices(plan)), warnings=tuple(warnings(plan)))


def _context(config: ModelConfig, tokens: int) -> int:
    """The model's own context, or what the cache holds of it, by pages of 64 tokens."""
    if tokens >= config.max_position_embeddings:
        return config.max_position_embeddings
    return tokens // 64 * 64
