"""Where the difference arises: each stream against the reference after one layer, from its files.

    hidden_error    sqrt(sum |h - h_ref|^2 / sum |h_ref|^2) of the hidden states that leave it
    router_changed  share of tokens whose set of chosen experts differs; None without experts
Sums are float64 over all tokens.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import closing

import torch

from fourge.evaluate.streams import Stream
from fourge.layerwise.activations import RowFile
from fourge.models.chunks import ROWS, slices
from fourge.models.config import ModelConfig


def attribute(
    reference: Stream, others: Sequence[Stream], config: ModelConfig, layer: int, tokens: int
) -> dict:
    """The record of one layer: {"layer", stream name: {"hidden_error", "router_changed"}}."""
    record: dict = {"layer": layer}
    for stream in others:
        error = _hidden_error(
            reference.entering(config, layer + 1), stream.entering(config, layer + 1), tokens
        )
        changed = None
        if config.is_sparse(layer):
            changed = _share_changed(
                reference.routing(config, layer), stream.routing(config, layer), tokens
            )
        record[stream.name] = {"hidden_error": error, "router_changed": changed}
    return record


def _hidden_error(theirs: RowFile, ours: RowFile, tokens: int) -> float:
    difference = norm = 0.0
    for wanted_ND, found_ND in _in_step(theirs, ours, tokens):
        wanted_ND = wanted_ND.double()
        norm += wanted_ND.square().sum().item()
        difference += wanted_ND.sub_(found_ND).square_().sum().item()
    return math.sqrt(difference / norm) if norm else math.sqrt(difference)


def _share_changed(theirs: RowFile, ours: RowFile, tokens: int) -> float:
    pairs = _in_step(theirs, ours, tokens)
    return sum(int((wanted != found).any(-1).sum()) for wanted, found in pairs) / tokens


def _in_step(
    theirs: RowFile, ours: RowFile, tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    with closing(theirs.open()), closing(ours.open()):
        for rows in slices(tokens, ROWS):
            count = rows.stop - rows.start
            yield theirs.read(rows.start, count), ours.read(rows.start, count)
