"""A checkpoint into memory, in parallel: what the engine computes with.

Three ways to hold the routed experts: expanded once and fused (one product for all of them), where
that fits; as stored, with the latest expanded ones kept (experts.py), on a CPU with less memory; as
stored, on a GPU, those of a layer one after the other if they are of one kind and the compute dtype
is bfloat16. Everything else is cast to the compute dtype once, but for the router and the indexer's
keys and head weights, which are float32. Peak memory: the result, and one expert or one layer's
other tensors per thread; for a GPU, STAGING_BYTES of pinned memory per thread as well.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from fourge.checkpoint.header import TensorInfo, aligned_bytes
from fourge.checkpoint.names import FUSED_DOWN, FUSED_GATE_UP, PROJECTIONS, expert_suffix, parse
from fourge.checkpoint.source import FileReader, check_finite, read_all_tensors
from fourge.engine.experts import ExpandedExperts, PackedLayer, expand
from fourge.formats.layout import packed_shape, scale_shape
from fourge.formats.nvfp4 import DTYPES
from fourge.layerwise.budget import default_workers
from fourge.layerwise.groups import by_layer, split_experts
from fourge.models.survey import Source
from fourge.models.tensors import projection_shape

Weights = Mapping[str, torch.Tensor]
OnProgress = Callable[[int, int], None]  # bytes read, of how many

# An expert of GLM-5.1 has 21 MiB. Fresh memory is slow to touch, and what is not pinned is copied
# twice on its way to a GPU.
STAGING_BYTES = 32 << 20

_PARTS = ("", "_scale", "_scale_2")  # of an NVFP4 weight's name, in the order of NVFP4Tensor
_FLOAT32 = ("self_attn.indexer.weights_proj.", "self_attn.indexer.k_norm.", "mlp.gate.")


@dataclass(frozen=True)
class Loaded:
    """A model's weights; layers by their number, the MTP layer the last."""

    embedding: torch.Tensor
    norm: torch.Tensor
    head: torch.Tensor
    layers: tuple[Weights, ...]
    experts: str  # "expanded", "cached" or "packed"

    @property
    def waits_for_nothing(self) -> bool:
        """Whether no layer looks on the host at which experts are chosen."""
        one_by_one = expert_suffix(0, PROJECTIONS[0])
        return not any(one_by_one in layer for layer in self.layers)


def stored_bytes(source: Source, layers: range) -> int:
    """Bytes on disk of what is loaded."""
    return sum(info.nbytes for info in _wanted(source, layers))


def expanded_bytes(source: Source, layers: range, itemsize: int) -> int:
    """Bytes of all weights in the compute dtype."""
    config = source.config
    expert = 3 * config.hidden_size * config.moe_intermediate_size * itemsize
    sparse = sum(config.is_sparse(layer) for layer in layers)
    return _other_bytes(source, layers, itemsize) + sparse * config.n_routed_experts * expert


class Loader:
    """Reads one checkpoint once."""

    def __init__(
        self, source: Source, layers: range, *, device: torch.device, dtype: torch.dtype,
        on_progress: OnProgress,
    ) -> None:  # fmt: skip
        self._source, self._layers = source, layers
        self._device, self._dtype = device, dtype
        self._on_progress = on_progress
        self._done, self._total = 0, stored_bytes(source, layers)
        self._lock = threading.Lock()
        self._staging = threading.local()

    def load(self, weight_budget: int) -> Loaded:
        """Expand experts if all weights fit in ``weight_budget`` bytes."""
        source, itemsize = self._source, self._dtype.itemsize
        groups = by_layer({info.name: info for info in _wanted(source, self._layers)})
        expanded = expanded_bytes(source, self._layers, itemsize)
        if self._device.type != "cpu":
            way, kept = "packed", None
        elif expanded <= weight_budget:
            way, kept = "expanded", None
        else:
            way, kept = "cached", self._room(weight_budget)
        with ThreadPoolExecutor(default_workers(), thread_name_prefix="load") as pool:
            outer = pool.submit(self._rest, groups[None])
            layers = [self._layer(pool, layer, groups[layer], way, kept) for layer in self._layers]
            rest = outer.result()
        embedding = rest["model.embed_tokens.weight"]
        head = rest.get("lm_head.weight", embedding)
        return Loaded(embedding, rest["model.norm.weight"], head, tuple(layers), way)

    def _room(self, weight_budget: int) -> ExpandedExperts:
        """As many expanded experts as fit beside the stored ones, and at least one token's."""
        config, itemsize = self._source.config, self._dtype.itemsize
        packed = stored_bytes(self._source, self._layers)
        expert = 3 * config.hidden_size * config.moe_intermediate_size * itemsize
        return ExpandedExperts(max(1, (weight_budget - packed) // expert), self._dtype)

    def _layer(
        self, pool: ThreadPoolExecutor, layer: int, tensors: list[TensorInfo], way: str,
        kept: ExpandedExperts | None,
    ) -> Weights:  # fmt: skip
        rest, experts = split_experts(tensors)
        others = pool.submit(self._rest, rest)
        if not experts:
            return others.result()
        own = {info.dtype for one in experts for info in one if info.name.endswith(".weight")}
        in_line = way == "packed" and self._dtype == torch.bfloat16
        if way == "expanded" or (in_line and own == {"BF16"}):
            return self._fused(pool, experts) | others.result()
        if in_line and own == {"U8"}:
            return self._stacked(pool, experts) | others.result()
        stored: dict[str, torch.Tensor] = {}
        for part in pool.map(self._read, experts):
            stored |= part
        if kept is None:
            return stored | others.result()
        return PackedLayer(layer, others.result(), stored, kept)

    def _fused(
        self, pool: ThreadPoolExecutor, experts: list[list[TensorInfo]]
    ) -> dict[str, torch.Tensor]:
        config = self._source.config
        rows, columns = projection_shape(config, "gate_proj")
        kind: dict[str, Any] = {"dtype": self._dtype, "device": self._device}
        gate_up = torch.empty(len(experts), 2 * rows, columns, **kind)
        down = torch.empty(len(experts), columns, rows, **kind)

        def fill(expert: int) -> None:
            stored = self._read(experts[expert])
            targets = (gate_up[expert, :rows], gate_up[expert, rows:], down[expert])
            for name, target in zip(PROJECTIONS, targets, strict=True):
                expand(stored, expert_suffix(expert, name, ""), self._dtype, target)

        list(pool.map(fill, range(len(experts))))
        return {FUSED_GATE_UP: gate_up, FUSED_DOWN: down}

    def _stacked(
        self, pool: ThreadPoolExecutor, experts: list[list[TensorInfo]]
    ) -> dict[str, torch.Tensor]:
        """NVFP4 as it is stored: see moe.run_fused_experts."""
        rows, columns = projection_shape(self._source.config, "gate_proj")
        shapes = {FUSED_GATE_UP: (2 * rows, columns), FUSED_DOWN: (columns, rows)}
        scalars = {FUSED_GATE_UP: (2,), FUSED_DOWN: ()}
        stacks: dict[str, torch.Tensor] = {}
        for name, shape in shapes.items():
            parts = (packed_shape(shape), scale_shape(shape), scalars[name])
            for part, one, dtype in zip(_PARTS, parts, DTYPES, strict=True):
                stacks[name + part] = torch.empty(
                    len(experts), *one, dtype=dtype, device=self._device
                )

        def fill(expert: int) -> None:
            stored = self._read(experts[expert])
            targets = ((FUSED_GATE_UP, 0, rows), (FUSED_GATE_UP, 1, rows), (FUSED_DOWN, 0, columns))
            for projection, (name, place, height) in zip(PROJECTIONS, targets, strict=True):
                for part in _PARTS:
                    one = stored[expert_suffix(expert, projection, f"weight{part}")]
                    target = stacks[name + part][expert]
                    if part == _PARTS[-1]:
                        target.view(-1)[place : place + 1] = one.reshape(1)
                    else:
                        target[place * height : (place + 1) * height] = one

        list(pool.map(fill, range(len(experts))))
        return stacks

    def _rest(self, tensors: list[TensorInfo]) -> dict[str, torch.Tensor]:
        """Cast and placed."""
        return {
            name: tensor.to(
                self._device, torch.float32 if name.startswith(_FLOAT32) else self._dtype
            )
            for name, tensor in self._read(tensors).items()
        }

    def _read(self, tensors: list[TensorInfo]) -> dict[str, torch.Tensor]:
        """Checked, on the device, under their names within the layer."""
        with FileReader(self._source.folder) as files:
            found = read_all_tensors(files, tensors, self._buffer(tensors))
        result = {}
        for name, tensor in found.items():
            placed = values = tensor.to(self._device)  # where checks are cheap too
            if placed.dtype == torch.float8_e4m3fn:  # its NaN is all ones but the sign
                values = torch.where(placed.view(torch.uint8) & 0x7F == 0x7F, torch.nan, 0.0)
            if values.is_floating_point():
                check_finite(name, values)
            result[parse(name).suffix] = placed
        with self._lock:
            self._done += sum(tensor.nbytes for tensor in found.values())
            self._on_progress(self._done, self._total)
        return result

    def _buffer(self, tensors: list[TensorInfo]) -> torch.Tensor | None:
        """Of this thread, which copies what it has read before it reads on; None if that stays on
        the CPU, or is more than a buffer holds."""
        if self._device.type == "cpu" or aligned_bytes(tensors) > STAGING_BYTES:
            return None
        if not hasattr(self._staging, "buffer"):
            self._staging.buffer = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True)
        return self._staging.buffer


def _wanted(source: Source, layers: range) -> list[TensorInfo]:
    return [
        info
        for name, info in source.tensors.items()
        if parse(name).layer in (None, *layers) and not name.endswith((".input_scale", "inv_freq"))
    ]


def _other_bytes(source: Source, layers: range, itemsize: int) -> int:
    """Of all that is no routed expert, cast."""
    groups = by_layer({info.name: info for info in _wanted(source, layers)})
    rest = [info for own in groups.values() for info in split_experts(own)[0]]
    return sum(info.nbytes * itemsize // 2 for info in rest)
