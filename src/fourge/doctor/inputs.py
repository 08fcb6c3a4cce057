"""Which input_scale a repaired checkpoint gives to projections that have none, or an unusable one.

The value of the other of gate and up, which see the same input; else the largest of the same layer
and pool (gate and up, or down): engines use that maximum anyway, and clipping hurts far more than
headroom. A shard that is cut off still holds the scalars at its begin.
Imports no torch.
"""

import json
import struct
from collections.abc import Collection, Iterable
from typing import NamedTuple

from fourge.checkpoint.names import expert_name
from fourge.doctor.evidence import Evidence
from fourge.doctor.scales import POOLS, is_usable, pool_of


class Inputs(NamedTuple):
    """Values to be written, by tensor; tensors for which the layer has no usable value."""

    values: dict[str, float]
    left: list[str]


def fitting_inputs(
    evidence: Evidence, projections: Iterable[tuple[int, int, str]], odd: Collection[str]
) -> Inputs:
    """Values for (layer, expert, projection) that lack a usable one, or whose gate and up differ.

    ``odd``: tensors whose value is no measurement.
    """
    known = _salvaged(evidence) | evidence.scalars
    pools: dict[tuple[int, str], dict[tuple[int, str], float | None]] = {}
    for layer, expert, name in projections:
        tensor = expert_name(layer, expert, name, "input_scale")
        value = known.get(tensor)
        usable = value is not None and is_usable(value) and tensor not in odd
        pool = pools.setdefault((layer, pool_of(name)), {})
        pool[expert, name] = value if usable else None
    inputs = Inputs({}, [])
    for (layer, kind), pool in pools.items():
        largest = max((value for value in pool.values() if value is not None), default=None)
        for expert, name in pool:
            tensor = expert_name(layer, expert, name, "input_scale")
            if largest is None:
                inputs.left.append(tensor)
                continue
            # Gate and up see the same input: a sound one of the two tells it exactly.
            pair = [pool.get((expert, other)) for other in POOLS[kind]]
            fitting = max((value for value in pair if value is not None), default=largest)
            info = evidence.tensors.get(tensor)
            is_scalar = info is not None and info.shape in ((), (1,))
            if evidence.scalars.get(tensor) != fitting or not is_scalar:
                inputs.values[tensor] = fitting
    return inputs


def _salvaged(evidence: Evidence) -> dict[str, float]:
    """Scalars that lie before the place where a shard was cut off."""
    found: dict[str, float] = {}
    for file in evidence.damaged.keys() & evidence.files.sizes.keys():
        size = evidence.files.sizes[file]
        try:
            length = int.from_bytes(evidence.files.read(file, 0, min(8, size)), "little")
            header = json.loads(evidence.files.read(file, 8, min(length, size)))
            for name, entry in header.items():
                if name.endswith(".input_scale") and entry["dtype"] == "F32":
                    begin, end = (8 + length + offset for offset in entry["data_offsets"])
                    if end <= size and end - begin == 4:
                        found[name] = struct.unpack("<f", evidence.files.read(file, begin, 4))[0]
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return found
