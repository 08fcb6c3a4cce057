"""Parts of few tokens through the layers, on a CPU in float32: models/decode.py over the cache."""

from collections.abc import Sequence

import numpy as np
import torch

from fourge.engine.cache import PagedCache
from fourge.engine.loader import Loaded
from fourge.engine.pages import NOBODY, pages_for
from fourge.engine.request import Part
from fourge.formats.cache_rows import PAGE_TOKENS
from fourge.models.config import ModelConfig
from fourge.models.decode import DecodeStep, Selection, decode_layer, decode_weights
from fourge.models.rope import RopeTable

# T tokens, D hidden, S parts, P pages of the longest


class Decoder:
    """The layers of a model whose weights and cache are float32 on the CPU."""

    def __init__(
        self, weights: Loaded, config: ModelConfig, cache: PagedCache, rope: RopeTable
    ) -> None:
        self._config = config
        self._cos_PR, self._sin_PR = (one.numpy() for one in rope)
        self._layers = [
            (decode_weights(own, config, layer), cache.rows(layer))
            for layer, own in enumerate(weights.layers)
        ]

    def run(
        self, hidden_TD: torch.Tensor, parts: Sequence[Part], layers: range, *, first: int
    ) -> torch.Tensor:
        """What leaves the last of ``layers``; ``hidden_TD`` is changed. ``first``: see cached.Run."""
        step = self._step(parts, first)
        selection: Selection | None = None
        hidden = hidden_TD.numpy()
        for layer in layers:
            weights, rows = self._layers[layer]
            hidden, selection = decode_layer(hidden, step, weights, self._config, rows, selection)
        return torch.from_numpy(hidden)

    def _step(self, parts: Sequence[Part], first: int) -> DecodeStep:
        count_S = np.array([part.num_tokens for part in parts])
        begin_S = np.array([part.position for part in parts])
        sequence_T = np.repeat(np.arange(len(parts)), count_S)
        # Rows of the step, less the row at which the own part starts, plus its first position.
        shift_S = begin_S + count_S - count_S.cumsum()
        position_T = np.arange(len(sequence_T)) + shift_S[sequence_T]
        num_pages = pages_for(int((begin_S + count_S).max()) + first)
        page_SP = np.full((len(parts), num_pages), NOBODY)
        for number, part in enumerate(parts):
            own = part.pages[:num_pages]
            page_SP[number, : len(own)] = own
        place_T = position_T + first
        slot_T = page_SP[sequence_T, place_T // PAGE_TOKENS] * PAGE_TOKENS + place_T % PAGE_TOKENS
        return DecodeStep(
            slot_T, position_T, sequence_T, page_SP, first, self._cos_PR, self._sin_PR
        )


def can_decode(weights: Loaded, config: ModelConfig, cache: PagedCache) -> bool:
    """Whether ``Decoder`` computes with these."""
    plain = weights.embedding.dtype == torch.float32 and cache.is_plain
    widths = config.hidden_size, config.moe_intermediate_size
    return plain and weights.experts == "expanded" and not any(width % 4 for width in widths)
