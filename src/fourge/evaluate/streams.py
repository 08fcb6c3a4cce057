"""The streams of hidden states that go through the layers side by side, each in files of its own.

    reference           the BF16 weights, FP32 arithmetic: what everything is held against
    floor               the BF16 weights, the arithmetic of the candidates
    w4a16-N, w4a4-N     candidate N; in w4a4 the experts' inputs are rounded to NVFP4 as well

A model's streams share its weights while they are in memory. A stream is done with a layer when
the file that enters the next one has its final name, so the files are the state of a run.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from fourge.checkpoint.header import TensorInfo
from fourge.checkpoint.names import expert_suffix
from fourge.layerwise.activations import (
    Batch,
    LayerActivations,
    RowFile,
    hidden_file,
    remove_before,
)
from fourge.layerwise.forward import Hooks, Passage, run_group
from fourge.layerwise.groups import Group
from fourge.models.config import ModelConfig
from fourge.models.moe import InputScales, Routed
from fourge.models.rope import RopeTable
from fourge.models.survey import Source

REFERENCE, FLOOR = "reference", "floor"
LANES = ("w4a16", "w4a4")


@dataclass(frozen=True)
class Stream:
    """One way through the model. ``dtype`` is that of arithmetic and of what lies in files."""

    name: str
    lane: str
    folder: Path
    dtype: torch.dtype

    @property
    def rounds_inputs(self) -> bool:
        return self.lane == "w4a4"

    def entering(self, config: ModelConfig, layer: int) -> RowFile:
        """The file of the hidden states that enter ``layer``; after the last, that leave it."""
        return hidden_file(self.folder, config, layer, self.dtype)

    def has_entered(self, layer: int) -> bool:
        """Whether that file is whole."""
        return (self.folder / f"hidden-{layer:05d}.bin").exists()

    def routing(self, config: ModelConfig, layer: int) -> RowFile:
        """The experts that ``layer`` chose for every token, ascending: int16 [T, K]."""
        path = self.folder / f"routing-{layer:05d}.bin"
        return RowFile(path, width=config.num_experts_per_tok, dtype=torch.int16)

    def forget_before(self, layer: int) -> None:
        """Delete what layers before ``layer`` needed or left."""
        remove_before(self.folder, layer)
        for path in self.folder.glob("routing-?????.bin"):
            if int(path.stem.split("-")[1]) < layer:
                path.unlink()


@dataclass(frozen=True)
class Model:
    """A checkpoint, its streams, and its decoder layers cut into what is in memory at a time."""

    name: str
    source: Source
    streams: tuple[Stream, ...]
    groups: tuple[tuple[Group, ...], ...]

    def pending(self, layer: int) -> tuple[Stream, ...]:
        """The streams that have not left ``layer`` yet."""
        return tuple(one for one in self.streams if not one.has_entered(layer + 1))


class LayerPassage:
    """The streams of one model on their way through one layer. Use as a context manager."""

    def __init__(self, model: Model, layer: int, rope: RopeTable, *, device: torch.device) -> None:
        self._config, self._layer = model.source.config, layer
        self._device = device
        self._streams = model.pending(layer)
        self._rope = rope
        self._stack = ExitStack()
        self._passages: dict[str, Passage] = {}
        self._routing: dict[str, RowFile] = {}

    def __enter__(self) -> "LayerPassage":
        config, layer = self._config, self._layer
        for stream in self._streams:
            activations = LayerActivations(
                stream.folder,
                config,
                layer,
                dtype=stream.dtype,
                device=self._device,
                stream=stream.dtype,
                keep_last=True,
            )
            self._stack.enter_context(activations)
            self._passages[stream.name] = Passage(config, self._rope, activations)
            if config.is_sparse(layer):
                routing = stream.routing(config, layer).create()
                self._stack.callback(routing.close)
                self._routing[stream.name] = routing
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(
        self,
        group: Group,
        weights: Mapping[str, torch.Tensor],
        batch: Batch,
        scales: InputScales | None,
    ) -> None:
        """One batch of every stream through a group; ``weights`` named relative to the layer."""
        for stream in self._streams:
            hooks = Hooks(
                input_scales=scales if stream.rounds_inputs else None,
                routed=lambda routed, name=stream.name: self._keep_routing(name, routed, batch),
            )
            run_group(self._passages[stream.name], group, weights, batch, hooks)

    def _keep_routing(self, name: str, routed: Routed, batch: Batch) -> None:
        chosen_TK = routed.experts_TK.sort(dim=-1).values
        self._routing[name].write(batch.start, chosen_TK)

    def commit(self) -> None:
        """Make the outputs last; the hidden states last of all, since they mark the layer done."""
        for stream in self._streams:
            if stream.name in self._routing:
                self._routing[stream.name].commit()
            self._passages[stream.name].activations.commit()


def input_scale_tensors(layer: list[TensorInfo]) -> list[TensorInfo]:
    """The ``input_scale`` of every projection of a layer that has one."""
    return [info for info in layer if info.name.endswith(".input_scale")]


def input_scales(
    values: Mapping[str, torch.Tensor], config: ModelConfig, *, scales_of: str
) -> InputScales:
    """From ``input_scale`` tensors, named relative to the layer, to one per expert.

    gate and up read one input, so the larger of the two counts. "layer": all experts get the
    largest of the layer, to which engines reduce it (vllm 0.33.0 flashinfer_fp4_moe.py:386-397,
    sglang 0.5.23 modelopt_quant.py:2768-2810); "expert": each its own.
    """

    def of(projection: str) -> torch.Tensor:
        names = [
            expert_suffix(expert, projection, "input_scale")
            for expert in range(config.n_routed_experts)
        ]
        return torch.stack([values[name].reshape(()).float() for name in names])

    gate_up_E, down_E = torch.maximum(of("gate_proj"), of("up_proj")), of("down_proj")
    if scales_of == "layer":
        gate_up_E = gate_up_E.max().expand_as(gate_up_E)
        down_E = down_E.max().expand_as(down_E)
    return InputScales(gate_up_E, down_E)
