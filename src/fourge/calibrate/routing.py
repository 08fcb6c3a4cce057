"""Coverage: what natural routing brought to each expert, as a record and in a few figures.

Experts that saw no token are named, not hidden: their weights are quantized from the weights
alone and they get their layer's ``input_scale``, which is what engines reduce it to anyway.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fourge.calibrate.observe import LayerStatistics


class Coverage(NamedTuple):
    """The closing figures over all experts of all MoE layers."""

    experts: int
    min_tokens: int
    median_tokens: float
    never_seen: int


def layer_record(layer: int, passes: Sequence[str], seen: LayerStatistics) -> dict:
    """The JSON record of one layer: per pass, one figure per expert in expert order."""
    return {
        "layer": layer,
        "never_seen": seen.never_seen(),
        "passes": {
            name: {
                "tokens": seen.tokens[index].tolist(),
                "gate_up_amax": seen.gate_up_amax[index].tolist(),
                "down_amax": seen.down_amax[index].tolist(),
            }
            for index, name in enumerate(passes)
        },
    }


def summarize(layers: Sequence[Mapping]) -> Coverage:
    """Coverage over the records of all layers; tokens are summed over passes."""
    totals = [
        sum(column)
        for layer in layers
        for column in zip(*(entry["tokens"] for entry in layer["passes"].values()), strict=True)
    ]
    if not totals:
        return Coverage(0, 0, 0.0, 0)
    return Coverage(len(totals), min(totals), statistics.median(totals), totals.count(0))
