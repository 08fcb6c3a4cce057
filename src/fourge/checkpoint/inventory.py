"""What is in a checkpoint, by role, dtype and layer, counted from headers.

Tolerant where the rest of the house is strict: a name that the table does not know is listed under
"unknown", since looking is how a person finds out. Imports no torch.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from fourge.checkpoint.header import Checkpoint, TensorInfo
from fourge.checkpoint.names import FUSED_DOWN, FUSED_GATE_UP, Role, find

UNKNOWN = "unknown"
_ROLES = [*Role, UNKNOWN]


@dataclass(frozen=True)
class Entry:
    """Tensors that share layer, role and dtype. A packed byte counts as two parameters, scales as
    none.
    """

    layer: int | None
    role: str
    dtype: str
    tensors: int
    parameters: int
    bytes: int


def inventory(checkpoint: Checkpoint) -> list[Entry]:
    """One entry per layer, role and dtype, in the order of layers."""
    sums: dict[tuple[int | None, str, str], Entry] = {}
    for info in checkpoint.tensors.values():
        found = find(info.name)
        layer, role = (found.layer, str(found.role)) if found else (None, UNKNOWN)
        _add(sums, Entry(layer, role, info.dtype, 1, count_parameters(info), info.nbytes))
    return sorted(sums.values(), key=_order)


def count_parameters(info: TensorInfo) -> int:
    """Weights that a tensor holds: NVFP4 codes are two to a byte, its scales are not weights."""
    found = find(info.name)
    numel = math.prod(info.shape)
    if found is None or found.role != Role.ROUTED_EXPERT:
        return numel
    if found.suffix not in (FUSED_DOWN, FUSED_GATE_UP) and found.part != "weight":
        return 0
    return 2 * numel if info.dtype == "U8" else numel


def by_role(entries: Iterable[Entry]) -> list[Entry]:
    """The same figures without regard to layers."""
    sums: dict[tuple[int | None, str, str], Entry] = {}
    for entry in entries:
        _add(sums, replace(entry, layer=None))
    return sorted(sums.values(), key=_order)


def _order(entry: Entry) -> tuple[int, int, str]:
    """By layer, then as Role lists them, then by dtype."""
    return (-1 if entry.layer is None else entry.layer, _ROLES.index(entry.role), entry.dtype)


def _add(sums: dict[tuple[int | None, str, str], Entry], entry: Entry) -> None:
    key = (entry.layer, entry.role, entry.dtype)
    old = sums.get(key)
    if old is not None:
        entry = replace(
            entry,
            tensors=old.tensors + entry.tensors,
            parameters=old.parameters + entry.parameters,
            bytes=old.bytes + entry.bytes,
        )
    sums[key] = entry


def like_layers(entries: Iterable[Entry]) -> list[tuple[range, list[Entry]]]:
    """Runs of neighbouring layers that hold the same, with the entries of one of them."""
    layers: dict[int, list[Entry]] = {}
    for entry in entries:
        if entry.layer is not None:
            layers.setdefault(entry.layer, []).append(entry)
    runs: list[tuple[range, list[Entry]]] = []
    for layer, own in sorted(layers.items()):
        if runs and runs[-1][0].stop == layer and _same(runs[-1][1], own):
            runs[-1] = (range(runs[-1][0].start, layer + 1), runs[-1][1])
        else:
            runs.append((range(layer, layer + 1), own))
    return runs


def _same(left: list[Entry], right: list[Entry]) -> bool:
    def plain(entries: list[Entry]) -> list[dict]:
        return [asdict(entry) | {"layer": None} for entry in entries]

    return plain(left) == plain(right)
