"""Parts of few tokens through the layers, on a CPU in float32: models/decode.py over the cache."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from fourge.engine.cache import PagedCache
from fourge.engine.loader import Loaded
from fourge.engine.pages import NOBODY, pages_for
from fourge.engine.request import Part
from fourge.formats.cache_rows import PAGE_TOKENS
from fourge.models.config import ModelConfig
from fourge.models.decode import DecodeStep, Selection, decode_layer, decode_weights, keep
from fourge.models.rope import RopeTable

# T tokens, D hidden, P positions

# Numbers of an expert's down projection up to which this way was measured to be no slower than the
# reference (hidden size 1024, 64 experts). It computes on one core, torch on all.
LARGEST_EXPERT = 1024 * 512
LARGEST_EXPERT_OF_THREADS = 1024 * 128


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
        self, hidden_TD: torch.Tensor, parts: Sequence[Part], layers: range, *, first: int,
        selection: Selection | None = None,
    ) -> tuple[torch.Tensor, Selection]:  # fmt: skip
        """What leaves ``layers``, and what the last one looked at; ``hidden_TD`` is changed.
        ``first``: see cached.Run. ``selection``: to look at that again.
        """
        step = self._step(parts, first)._replace(looks_again=selection is not None)
        hidden = hidden_TD.numpy()
        for layer in layers:
            weights, rows = self._layers[layer]
            hidden, selection = decode_layer(hidden, step, weights, self._config, rows, selection)
        assert selection is not None
        return torch.from_numpy(hidden), selection

    def keep(
        self, hidden_TD: torch.Tensor, parts: Sequence[Part], layer: int, *, first: int
    ) -> None:
        """What the cache holds of the tokens; any number of them."""
        weights, rows = self._layers[layer]
        keep(hidden_TD.numpy(), self._step(parts, first), weights, self._config, rows)

    def _step(self, parts: Sequence[Part], first: int) -> DecodeStep:
        longest = max(part.position + part.num_tokens for part in parts)
        num_pages = pages_for(longest + first)
        pages, slots, positions, sequences = [], [], [], []
        for number, part in enumerate(parts):
            own = part.pages[:num_pages]
            pages.append([*own, *[NOBODY] * (num_pages - len(own))])
            for position in range(part.position, part.position + part.num_tokens):
                page, place = divmod(position + first, PAGE_TOKENS)
                slots.append(own[page] * PAGE_TOKENS + place)
                positions.append(position)
                sequences.append(number)
        slot_T, position_T, sequence_T = map(np.array, (slots, positions, sequences))
        return DecodeStep(
            slot_T, position_T, sequence_T, np.array(pages), first, longest, self._cos_PR,
            self._sin_PR,
        )  # fmt: skip


@contextmanager
def one_thread() -> Iterator[None]:
    """Products of few tokens are over before a second thread has begun, and wait for it all the
    same: longer than the whole step takes, where others use the machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def can_decode(weights: Loaded, config: ModelConfig, cache: PagedCache) -> bool:
    """Whether ``Decoder`` computes with these."""
    plain = weights.embedding.dtype == torch.float32 and cache.is_plain
    widths = (
        config.hidden_size, config.moe_intermediate_size, config.qk_nope_head_dim,
        config.v_head_dim, config.index_head_dim,
    )  # fmt: skip
    largest = LARGEST_EXPERT if torch.get_num_threads() == 1 else LARGEST_EXPERT_OF_THREADS
    return (
        plain
        and weights.experts == "expanded"
        and config.hidden_size * config.moe_intermediate_size <= largest
        and not any(width % 4 for width in widths)
    )
