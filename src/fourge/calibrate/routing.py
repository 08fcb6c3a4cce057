"""Coverage: what natural routing brought to each expert, as a record and in a few figures.

Experts that saw no token are named, not hidden: their weights are quantized from the weights
alone and they get their layer's ``input_scale``, which is what engines reduce it to anyway.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fourge.calibrate.observe import LayerStatistics


class Coverage(NamedTuple):
    """The closing figures over all experts of all MoE layers."""

    experts: int
    min_tokens: int
    median_tokens: float
    never_seen: int


def layer_record(layer: int, passes: Sequence[str], seen: LayerStatistics) -> dict:
    """The JSON record of one layer: per pass, one figure per expert in expert order.

    ``first_seen``: how many tokens of the corpus, in order, it took until the expert got one.
    """
    return {
        "layer": layer,
        "never_seen": seen.never_seen(),
        "first_seen": seen.first_seen.tolist(),
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


def saturation(layers: Sequence[Mapping], tokens: int) -> dict:
    """The curve of experts, over all layers, that had got a token after so many tokens.

    Points lie where powers of 2^(1/4) do, so that the early rise is seen and a long corpus fits.
    """
    firsts = np.sort([first for layer in layers for first in layer["first_seen"] if first])
    steps = np.unique(np.floor(2.0 ** np.arange(0, np.log2(max(tokens, 1)), 0.25)).astype(int))
    at = [int(step) for step in steps if step < tokens] + [tokens]
    return {"tokens": at, "experts_seen": np.searchsorted(firsts, at, side="right").tolist()}
