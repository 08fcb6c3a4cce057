"""Chunks of requests through the model, and the MTP layer's drafts after them.

Slots and positions. Token i of a sequence has position i and lies in slot i of its pages. The MTP
layer sees token i together with the target's hidden state of token i - 1, at position i - 1, and
keeps it in slot i too: so what a page holds depends on the tokens up to its last alone, and pages
are reused under speculation as they are. The first token after a reused prefix needs the hidden
state before it, which is kept for the last token of every page.
Knows no sampling: who drafts is asked for every draft.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, takewhile
from typing import NamedTuple

import numpy as np
import torch

from fourge.engine.cache import PagedCache
from fourge.engine.decoding import Decoder, can_decode
from fourge.engine.graphs import DecodeGraphs, Inputs
from fourge.engine.loader import Loaded
from fourge.engine.pages import NOBODY, pages_for
from fourge.engine.request import Chunk, Part, Request
from fourge.engine.transfers import to_device
from fourge.formats.cache_rows import PAGE_TOKENS
from fourge.models.cached import FEW_QUERIES, Run, Selections, Step, cached_layer, everything, keep
from fourge.models.config import ModelConfig
from fourge.models.decode import Selection as CompiledSelection
from fourge.models.decode import norm
from fourge.models.linear import linear
from fourge.models.mtp import Norm, mtp_input, mtp_output
from fourge.models.norm import rms_norm
from fourge.models.rope import RopeTable, rope_table

# T tokens of a step, D hidden, V vocabulary, B requests that draft, K drafts

# Logits [B, V] of one draft of each request, and which draft it is -> the drafts' ids [B].
Choose = Callable[[torch.Tensor, int], torch.Tensor]


# What the MTP layer looked at for the tokens of some sequences, in the form of either way.
Looked = CompiledSelection | Selections | None


class Newest(NamedTuple):
    """Tokens of the step before that the device alone knows yet."""

    token_B: torch.Tensor
    rows: Mapping[Request, int]


class Shown(NamedTuple):
    """Tokens for the MTP layer, with the rows of the hidden states before them."""

    tokens: list[int]
    rows: list[int]
    parts: list[Part]

    def add(self, tokens: Sequence[int], rows: Sequence[int], part: Part) -> None:
        if tokens:
            self.tokens.extend(tokens)
            self.rows.extend(rows)
            self.parts.append(part)


class Runner:
    """A loaded model with its cache."""

    def __init__(
        self, weights: Loaded, config: ModelConfig, cache: PagedCache, *, dtype: torch.dtype,
        num_positions: int, eager: bool,
    ) -> None:  # fmt: skip
        """``eager``: no CUDA graphs."""
        self._weights, self._config, self._cache = weights, config, cache
        self._dtype, self._device = dtype, weights.embedding.device
        self._rope = rope_table(config, num_positions, self._device)
        self._decoder: Decoder | None = None
        self._norm: Norm = rms_norm
        if can_decode(weights, config, cache):
            self._decoder, self._norm = Decoder(weights, config, cache, self._rope), norm
        self._graphs: DecodeGraphs | None = None
        self._draft_graphs: DecodeGraphs | None = None
        if self._device.type == "cuda" and not eager and weights.waits_for_nothing:
            none_TD = torch.empty(0, 0, device=self._device)
            self._graphs = DecodeGraphs(self._decode, first=0, hidden=none_TD)
            # What the first draft looked at would have to go from one graph to the next.
            if len(cache.last_hidden_PD) and not config.index_share_for_mtp_iteration:
                none_TD = torch.empty(0, config.hidden_size, dtype=dtype, device=self._device)
                self._draft_graphs = DecodeGraphs(self._decode_draft, first=1, hidden=none_TD)

    def only_decodes(self, chunks: Sequence[Chunk]) -> bool:
        """Whether all of ``chunks`` go the fast way."""
        return self._decoder is not None and all(one.num_tokens <= FEW_QUERIES for one in chunks)

    def target(self, chunks: Sequence[Chunk], newest: Newest | None = None) -> torch.Tensor:
        """Hidden states [T, D] after the final norm, of the chunks' tokens one after the other;
        ``newest`` has those that the requests do not know.
        """
        token_T = self._tokens(chunks, newest)
        parts = [Part(one.request.pages, one.start, one.num_tokens) for one in chunks]
        hidden_TD = self._replayed(token_T, chunks)
        if hidden_TD is None:
            layers = range(self._config.num_hidden_layers)
            hidden_TD = self._layers(self._embed(token_T), parts, layers, first=0)
            hidden_TD = self._final_norm(hidden_TD)
        if len(self._cache.last_hidden_PD):
            self._keep_last_hidden(hidden_TD, parts)
        return hidden_TD

    def _tokens(self, chunks: Sequence[Chunk], newest: Newest | None) -> torch.Tensor:
        tokens: list[int] = []
        sources: list[int] = []  # rows of the newest; -1: known
        for chunk in chunks:
            known = chunk.request.tokens[chunk.start : chunk.start + chunk.num_committed]
            sources += [-1] * len(known)
            tokens += known
            if len(known) < chunk.num_committed:
                assert newest is not None, "a token is not known, and no step is in flight"
                sources.append(newest.rows[chunk.request])
                tokens.append(0)
            sources += [-1] * len(chunk.drafts)
            tokens += chunk.drafts
        if newest is None:
            return to_device(np.array(tokens), self._device)
        token_T, source_T = to_device(np.array([tokens, sources]), self._device)
        return torch.where(source_T < 0, token_T, newest.token_B[source_T.clamp(min=0)])

    def _final_norm(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        return self._norm(hidden_TD, self._weights.norm, self._config.rms_norm_eps)

    def _decode(self, inputs: Inputs) -> torch.Tensor:
        """The target over tokens whose places lie on the device."""
        num_keys = inputs.page_MP.shape[1] * PAGE_TOKENS
        position_MN = inputs.begin_M1 + torch.arange(inputs.token_MN.shape[1], device=self._device)
        run = _placed(inputs.page_MP, position_MN, num_keys, start=0, first=0)
        hidden_TD = self._embed(inputs.token_MN.flatten())
        layers = range(self._config.num_hidden_layers)
        return self._final_norm(self._reference(hidden_TD, self._join([run]), layers)[0])

    def _replayed(self, token_T: torch.Tensor, chunks: Sequence[Chunk]) -> torch.Tensor | None:
        """A step in which everybody decodes, with equally many drafts."""
        if self._graphs is None or len({(one.num_committed, one.num_tokens) for one in chunks}) > 1:
            return None
        if chunks[0].num_committed > 1:
            return None
        begins = [one.start for one in chunks]
        return self._graphs.run(token_T, begins, [one.request.pages for one in chunks])

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """float32 [N, V]."""
        return linear(hidden_ND, self._weights.head).float()

    def predict(
        self, chunks: Sequence[Chunk], hidden_TD: torch.Tensor, num_drafts: int, choose: Choose
    ) -> torch.Tensor | None:
        """Show the MTP layer what the target saw; then draft for the chunks whose requests have
        chosen a new token. ``hidden_TD`` is target's result; requests are as after the choice.
        Returns int64 [B, K], or None where nobody drafts.
        """
        held = [hidden_TD]
        num_rows, row = len(hidden_TD), 0
        shown, drafting = Shown([], [], []), Shown([], [], [])
        requests: list[Request] = []
        for chunk in chunks:
            request, begin = chunk.request, chunk.request.num_predicted
            known = request.tokens[begin : chunk.start + chunk.num_tokens + 1]
            rows = [row + token - chunk.start - 1 for token in range(begin, begin + len(known))]
            row += chunk.num_tokens
            if begin < chunk.start + 1:  # the first token after a reused prefix
                page = request.pages[chunk.start // PAGE_TOKENS - 1]
                held.append(self._cache.last_hidden_PD[page : page + 1].to(hidden_TD.dtype))
                rows[0] = num_rows
                num_rows += 1
            request.num_predicted = begin + len(known)
            if chunk.samples and request.finish_reason is None:
                drafting.add(known[-1:], rows[-1:], Part(request.pages, len(request.tokens) - 2, 1))
                requests.append(request)
                known, rows = known[:-1], rows[:-1]
            shown.add(known, rows, Part(request.pages, begin - 1, len(known)))
        known_TD = torch.cat(held) if len(held) > 1 else hidden_TD
        if shown.tokens:
            self._show(shown, known_TD)
        return self._draft(drafting, known_TD, num_drafts, choose) if requests else None

    def _given(self, shown: Shown, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens, and the hidden states before them."""
        token_T, row_T = to_device(np.array([shown.tokens, shown.rows]), self._device)
        return token_T, hidden_TD[row_T]

    def _show(self, shown: Shown, hidden_TD: torch.Tensor) -> None:
        """Keep tokens from which nobody drafts: of the one layer, its output is not needed."""
        layer, weights = self._config.num_hidden_layers, self._weights.layers[-1]
        joined_TD = self._mtp_input(*self._given(shown, hidden_TD))
        if self._decoder is not None:
            self._decoder.keep(joined_TD, shown.parts, layer, first=1)
            return
        step = self._step(shown.parts, first=1)
        keep(joined_TD, step, weights, self._config, layer, self._cache)

    def _draft(
        self, drafting: Shown, hidden_TD: torch.Tensor, num_drafts: int, choose: Choose
    ) -> torch.Tensor:
        """K drafts of each; the layer's own output is recycled, after its norm. With
        ``index_share_for_mtp_iteration`` all drafts of a request look at what was selected for the
        first one, and so not at each other (as in vllm 0.33, sglang 0.5.23).
        """
        head = self._weights.layers[-1].get("shared_head.head.weight", self._weights.head)
        token_B, hidden_BD = self._given(drafting, hidden_TD)
        drafts: list[torch.Tensor] = []
        looked: Looked = None
        for number in range(num_drafts):
            parts = [one._replace(position=one.position + number) for one in drafting.parts]
            hidden_BD, found = self._mtp(token_B, hidden_BD, parts, looked)
            if self._config.index_share_for_mtp_iteration:
                looked = found
            token_B = choose(linear(hidden_BD, head).float(), number)
            drafts.append(token_B)
        return torch.stack(drafts, 1)

    def _mtp(
        self, token_B: torch.Tensor, hidden_BD: torch.Tensor, parts: Sequence[Part], looked: Looked
    ) -> tuple[torch.Tensor, Looked]:
        """The MTP layer over one token of each sequence. ``looked``: to look at that again."""
        if self._draft_graphs is not None:
            begins, pages = [one.position for one in parts], [one.pages for one in parts]
            replayed_BD = self._draft_graphs.run(token_B, begins, pages, hidden_BD)
            if replayed_BD is not None:
                return replayed_BD, None
        joined_BD = self._mtp_input(token_B, hidden_BD)
        if self._decoder is not None:
            assert looked is None or isinstance(looked, CompiledSelection)
            layer = self._config.num_hidden_layers
            joined_BD, looked = self._decoder.run(
                joined_BD, parts, range(layer, layer + 1), first=1, selection=looked
            )
        else:
            assert not isinstance(looked, CompiledSelection)
            step = self._step(parts, first=1)
            joined_BD, looked = self._reference_mtp(joined_BD, step, looked)
            (run,), (selection,) = step.runs, looked
            looked = [everything(run) if selection is None else selection]
        return mtp_output(joined_BD, self._weights.layers[-1], self._config, self._norm), looked

    def _reference_mtp(
        self, joined_BD: torch.Tensor, step: Step, looked: Selections | None
    ) -> tuple[torch.Tensor, Selections]:
        layer = self._config.num_hidden_layers
        return self._reference(joined_BD, step, range(layer, layer + 1), looked)

    def _decode_draft(self, inputs: Inputs) -> torch.Tensor:
        """The MTP layer over one token of each sequence, whose places lie on the device."""
        num_keys = inputs.page_MP.shape[1] * PAGE_TOKENS - 1
        run = _placed(inputs.page_MP, inputs.begin_M1, num_keys, start=0, first=1)
        joined_BD = self._mtp_input(inputs.token_MN.flatten(), inputs.hidden_TD)
        joined_BD, _ = self._reference_mtp(joined_BD, self._join([run]), None)
        return mtp_output(joined_BD, self._weights.layers[-1], self._config, self._norm)

    def _mtp_input(self, token_T: torch.Tensor, hidden_TD: torch.Tensor) -> torch.Tensor:
        weights = self._weights.layers[-1]
        table = weights.get("embed_tokens.weight", self._weights.embedding)
        embedding_TD = self._embed(token_T, table)
        return mtp_input(hidden_TD, embedding_TD, weights, self._config, self._norm)

    def _embed(self, token_T: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        table = self._weights.embedding if table is None else table
        return table.index_select(0, token_T).to(self._dtype)

    def _layers(
        self, hidden_TD: torch.Tensor, parts: Sequence[Part], layers: range, *, first: int
    ) -> torch.Tensor:
        """``first``: see Run. Sequences do not see each other: few tokens go the fast way."""
        if self._decoder is None:
            return self._reference(hidden_TD, self._step(parts, first=first), layers)[0]
        few = list(takewhile(lambda part: part.num_tokens <= FEW_QUERIES, parts))
        rows, many, done = sum(part.num_tokens for part in few), parts[len(few) :], []
        if few:
            done.append(self._decoder.run(hidden_TD[:rows], few, layers, first=first)[0])
        if many:
            step = self._step(many, first=first)
            done.append(self._reference(hidden_TD[rows:], step, layers)[0])
        return torch.cat(done)

    def _reference(
        self, hidden_TD: torch.Tensor, step: Step, layers: range, looked: Selections | None = None
    ) -> tuple[torch.Tensor, Selections]:
        """``looked``: to look at that again."""
        selections = [None] * len(step.runs) if looked is None else looked
        step = step._replace(looks_again=looked is not None)
        for layer in layers:
            hidden_TD, selections = cached_layer(
                hidden_TD, step, self._weights.layers[layer], self._config, layer, self._cache,
                selections,
            )  # fmt: skip
        return hidden_TD, selections

    def _step(self, parts: Sequence[Part], *, first: int) -> Step:
        """Neighbouring parts of one small size make a run; ``first``: see Run."""
        runs: list[Run] = []
        start = 0
        for few, group in groupby(
            parts, lambda part: part.num_tokens if part.num_tokens <= FEW_QUERIES else 0
        ):
            members = list(group)
            for own in [members] if few else [[one] for one in members]:
                runs.append(self._run(own, start, first))
                start = runs[-1].rows.stop
        return self._join(runs)

    def _join(self, runs: Sequence[Run]) -> Step:
        position_T = torch.cat([run.position_MN.flatten() for run in runs])
        slot_T = torch.cat([run.slot_MS.gather(1, run.position_MN).flatten() for run in runs])
        rope = RopeTable(self._rope.cos_PR[position_T], self._rope.sin_PR[position_T])
        return Step(slot_T, rope, self._rope, tuple(runs))

    def _run(self, parts: Sequence[Part], start: int, first: int) -> Run:
        count = parts[0].num_tokens
        num_keys = max(part.position for part in parts) + count
        num_pages = pages_for(num_keys + first)
        pages = np.full((len(parts), num_pages), NOBODY, dtype=np.int64)
        for number, part in enumerate(parts):
            own = part.pages[:num_pages]
            pages[number, : len(own)] = own
        page_MP = to_device(pages, self._device)
        begin_M1 = to_device(np.array([[part.position] for part in parts]), self._device)
        position_MN = begin_M1 + torch.arange(count, device=self._device)
        return _placed(page_MP, position_MN, num_keys, start=start, first=first)

    def _keep_last_hidden(self, hidden_TD: torch.Tensor, parts: Sequence[Part]) -> None:
        rows, pages, start = [], [], 0
        for part in parts:
            ahead = -(part.position + 1) % PAGE_TOKENS  # of the first token, to its page's last
            for row in range(ahead, part.num_tokens, PAGE_TOKENS):
                rows.append(start + row)
                pages.append(part.pages[(part.position + row) // PAGE_TOKENS])
            start += part.num_tokens
        if rows:
            self._cache.last_hidden_PD[pages] = hidden_TD[rows].float()


def _placed(
    page_MP: torch.Tensor, position_MN: torch.Tensor, num_keys: int, *, start: int, first: int
) -> Run:
    """Sequences whose rows of the step begin at ``start``; of each, ``num_keys`` slots."""
    place_S = torch.arange(PAGE_TOKENS, device=page_MP.device)
    slot_MS = (page_MP.unsqueeze(-1) * PAGE_TOKENS + place_S).flatten(1)
    rows = slice(start, start + position_MN.numel())
    return Run(rows, page_MP, slot_MS[:, first : first + num_keys], position_MN, first)
