"""Decode steps, and drafts, as CUDA graphs: one launch in place of some forty a layer.

A graph takes fixed numbers of sequences and of pages; a step is filled up to the next ones with
sequences at position 0 of nobody's page. A graph is captured when a step first needs it, and all
of them share their memory. Steps over so many keys that the device is busy longer than launching
takes are left to the caller.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from fourge.engine.pages import NOBODY
from fourge.engine.transfers import to_device
from fourge.formats.cache_rows import PAGE_TOKENS
from fourge.models.cached import FEW_QUERIES

# M sequences, N new tokens of each, P pages of each, D hidden

LEAST_PAGES = 32
MOST_KEYS = 1 << 21  # of all sequences, those of filled up pages included


class Inputs(NamedTuple):
    """What differs from step to step; int64 but for hidden states."""

    token_MN: torch.Tensor
    begin_M1: torch.Tensor  # position of the first new token
    page_MP: torch.Tensor
    hidden_TD: torch.Tensor  # that the tokens come with, T = M * N; of no numbers if with none


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    hidden: torch.Tensor


class DecodeGraphs:
    """Runs ``forward``, which makes hidden states [M * N, D] of Inputs and waits for nothing."""

    def __init__(
        self, forward: Callable[[Inputs], torch.Tensor], *, first: int, hidden: torch.Tensor
    ) -> None:
        """``first``: see cached.Run. ``hidden``: [0, D], like the hidden states that tokens come
        with; D is 0 if they come with none.
        """
        self._forward, self._first, self._hidden = forward, first, hidden
        self._device = hidden.device
        self._captured: dict[tuple[int, int, int], _Captured] = {}

    def run(
        self, token_T: torch.Tensor, begins: Sequence[int], pages: Sequence[Sequence[int]],
        hidden_TD: torch.Tensor | None = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Hidden states [T, D] of sequences that bring equally many tokens; None: too much."""
        count = len(token_T) // len(begins)
        shape = _filled_up(len(begins), max(begins) + count + self._first)
        if count > FEW_QUERIES or shape[0] * shape[1] * PAGE_TOKENS > MOST_KEYS:
            return None
        captured = self._captured.get((*shape, count)) or self._capture(*shape, count)
        page_MP = np.full(shape, NOBODY, dtype=np.int64)
        for row, own in zip(page_MP, pages, strict=False):
            own = own[: shape[1]]
            row[: len(own)] = own
        begin_M1 = np.zeros((shape[0], 1), dtype=np.int64)
        begin_M1[: len(begins), 0] = begins
        inputs = captured.inputs
        inputs.token_MN.flatten()[: len(token_T)] = token_T
        if hidden_TD is not None:
            inputs.hidden_TD[: len(token_T)] = hidden_TD
        inputs.begin_M1.copy_(to_device(begin_M1, self._device))
        inputs.page_MP.copy_(to_device(page_MP, self._device))
        captured.graph.replay()
        return captured.hidden[: len(token_T)].clone()

    def _capture(self, num_sequences: int, num_pages: int, count: int) -> _Captured:
        inputs = self._empty(num_sequences, num_pages, count)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):  # what is set up at a first call cannot be captured
            self._forward(inputs)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        others = list(self._captured.values())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=others[0].graph.pool() if others else None):
            hidden = self._forward(inputs)
        captured = _Captured(graph, inputs, hidden)
        self._captured[num_sequences, num_pages, count] = captured
        return captured

    def _empty(self, num_sequences: int, num_pages: int, count: int) -> Inputs:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=self._device)

        return Inputs(
            zeros(num_sequences, count),
            zeros(num_sequences, 1),
            zeros(num_sequences, num_pages),
            self._hidden.new_zeros(num_sequences * count, self._hidden.shape[1]),
        )


def _filled_up(num_sequences: int, num_positions: int) -> tuple[int, int]:
    """Sequences and pages of the graph for these: powers of two."""
    num_pages = max(LEAST_PAGES, -(-num_positions // PAGE_TOKENS))
    return 1 << (num_sequences - 1).bit_length(), 1 << (num_pages - 1).bit_length()
