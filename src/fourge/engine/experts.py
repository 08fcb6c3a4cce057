"""Routed experts that are kept as stored: expanded when they are asked for, the latest ones kept.

For checkpoints whose expanded experts do not fit in memory. Looks like a mapping of a layer's
weights, so that models/moe.py runs it unchanged. Memory: the packed experts, and ``capacity``
expanded ones in all; the memory of an expert that is dropped is used for the next.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping

import torch

from fourge.checkpoint.names import PROJECTIONS, expert_suffix
from fourge.formats import kernels
from fourge.formats.nvfp4 import NVFP4Tensor

Expert = dict[str, torch.Tensor]


class ExpandedExperts:
    """The most recently used expanded experts of all layers."""

    def __init__(self, capacity: int, dtype: torch.dtype) -> None:
        self.capacity, self.hits, self.misses = capacity, 0, 0
        self._dtype = dtype
        self._kept: OrderedDict[tuple[int, int], Expert] = OrderedDict()

    def get(self, layer: int, expert: int, stored: Mapping[str, torch.Tensor]) -> Expert:
        """Projection -> weight; valid until ``capacity`` others have been asked for."""
        key = (layer, expert)
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key]
        self.misses += 1
        room: Expert = {}
        if len(self._kept) >= self.capacity:
            room = self._kept.popitem(last=False)[1]
        self._kept[key] = {
            name: expand(stored, expert_suffix(expert, name, ""), self._dtype, room.get(name))
            for name in PROJECTIONS
        }
        return self._kept[key]


class PackedLayer(Mapping[str, torch.Tensor]):
    """A layer's weights; names of experts' weights give expanded ones, their scales are not
    there.
    """

    def __init__(
        self, layer: int, rest: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor],
        kept: ExpandedExperts,
    ) -> None:  # fmt: skip
        self._layer, self._rest, self._stored, self._kept = layer, rest, stored, kept

    def __getitem__(self, name: str) -> torch.Tensor:
        if not name.startswith("mlp.experts."):
            return self._rest[name]
        if name not in self._stored or not name.endswith(".weight"):
            raise KeyError(name)
        expert, projection, _ = name.removeprefix("mlp.experts.").split(".")
        return self._kept.get(self._layer, int(expert), self._stored)[projection]

    def __iter__(self) -> Iterator[str]:
        yield from self._rest
        yield from (name for name in self._stored if name.endswith(".weight"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def expand(
    stored: Mapping[str, torch.Tensor],
    prefix: str,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight whose tensors begin with ``prefix``, in ``dtype``, into ``out`` if given."""
    weight = stored[prefix + "weight"]
    scale = stored.get(prefix + "weight_scale")
    if scale is None:
        return weight.to(dtype) if out is None else out.copy_(weight)
    scale_2 = stored[prefix + "weight_scale_2"].reshape(())
    return kernels.dequantize(NVFP4Tensor(weight, scale, scale_2), dtype, out)
