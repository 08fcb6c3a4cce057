"""One batch through the part of a layer that is in memory.

The first group attends and routes, every group runs its experts, the last one gives the output;
between groups a batch waits in files (activations.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fourge.layerwise.activations import Batch, LayerActivations
from fourge.layerwise.groups import Group
from fourge.models import layer as model
from fourge.models.config import ModelConfig
from fourge.models.moe import InputScales, Observer, Routed
from fourge.models.rope import RopeTable


@dataclass(frozen=True)
class Passage:
    """What all batches of a layer share: the model, and the files around the layer."""

    config: ModelConfig
    rope: RopeTable
    activations: LayerActivations


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a caller sees or changes on the way; see moe.run_experts for two of them."""

    observe: Observer | None = None
    input_scales: InputScales | None = None
    routed: Callable[[Routed], None] | None = None  # called once a batch, before any expert ran


def run_group(
    passage: Passage,
    group: Group,
    weights: Mapping[str, torch.Tensor],
    batch: Batch,
    hooks: Hooks,
) -> None:
    """Take ``batch`` through ``group``; ``weights`` are named relative to the layer."""
    config, activations = passage.config, passage.activations
    if group.is_first:
        hidden, topk = model.attend(
            activations.read_input(batch),
            batch.lengths,
            weights,
            config,
            group.layer,
            passage.rope,
            activations.read_topk(batch),
        )
        activations.write_topk(batch, topk)
        if not config.is_sparse(group.layer):
            activations.write_output(batch, model.dense_mlp(hidden, weights, config))
            return
        routed = model.route(hidden, weights, config)
        if hooks.routed is not None:
            hooks.routed(routed)
    else:
        routed = activations.take_up(batch)
    model.run_experts(
        routed, weights, group.experts, observe=hooks.observe, input_scales=hooks.input_scales
    )
    if group.is_last:
        activations.write_output(batch, routed.acc_TD)
    else:
        activations.hold(batch, routed, is_first=group.is_first)
