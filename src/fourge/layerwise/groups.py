"""How a layer is cut into what is in memory at a time: its other tensors, then whole experts.

Imports no torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fourge.checkpoint.header import TensorInfo, aligned_bytes
from fourge.checkpoint.names import Role, parse
from fourge.layerwise.budget import Pieces

# A layer's tensors that are not routed experts', and those of each expert.
LayerParts = tuple[list[TensorInfo], list[list[TensorInfo]]]


@dataclass(frozen=True)
class Group:
    """What is in memory at a time: some experts of a layer, and first of all its other tensors."""

    layer: int
    tensors: tuple[TensorInfo, ...]
    experts: range
    is_first: bool
    is_last: bool


def by_layer(tensors: Mapping[str, TensorInfo]) -> dict[int | None, list[TensorInfo]]:
    """The tensors of every layer; under None those outside of layers."""
    layers: dict[int | None, list[TensorInfo]] = {}
    for name, info in tensors.items():
        layers.setdefault(parse(name).layer, []).append(info)
    return layers


def split_experts(tensors: Iterable[TensorInfo]) -> LayerParts:
    """A layer's other tensors, and all that belongs to each routed expert, in expert order."""
    rest: list[TensorInfo] = []
    experts: dict[int, list[TensorInfo]] = {}
    for info in tensors:
        parsed = parse(info.name)
        if parsed.role == Role.ROUTED_EXPERT:
            assert parsed.expert is not None
            experts.setdefault(parsed.expert, []).append(info)
        else:
            rest.append(info)
    return rest, [experts[expert] for expert in sorted(experts)]


def cut(layer: int, parts: LayerParts, capacity: int, beside: int = 0) -> tuple[Group, ...]:
    """Cut a layer into groups of at most ``capacity`` bytes: the rest first, then whole experts,
    each of which takes ``beside`` more than its weights.
    """
    rest, experts = parts
    cuts: list[tuple[list[TensorInfo], int, int]] = [([*rest], 0, 0)]
    size = aligned_bytes(rest)
    for expert, own in enumerate(experts):
        members, first, _ = cuts[-1]
        added = aligned_bytes(own) + beside
        if size + added > capacity:
            cuts.append(([*own], expert, expert + 1))
            size = added
        else:
            members += own
            cuts[-1] = (members, first, expert + 1)
            size += added
    return tuple(
        Group(layer, tuple(members), range(first, end), number == 0, number == len(cuts) - 1)
        for number, (members, first, end) in enumerate(cuts)
    )


def measure_pieces(layers: Sequence[LayerParts], beside: int = 0) -> Pieces:
    """The sizes that a memory budget must reckon with; ``beside``: see cut."""
    whole = least = tensor = 1
    for rest, experts in layers:
        parts = [rest, *experts]
        sizes = [aligned_bytes(rest), *(aligned_bytes(part) + beside for part in experts)]
        whole, least = max(whole, sum(sizes)), max(least, *sizes)
        tensor = max(tensor, *(info.nbytes for part in parts for info in part))
    return Pieces(whole, least, tensor)
