"""Steps of fixed shapes, as graphs take them, give what steps of any shape give.

Without a GPU: a graph that is captured by doing it, and replayed by doing it again.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine_models import SMALL, greedy, outputs, random_tokens, serve
from fourge.engine.engine import Engine
from fourge.engine.graphs import DecodeGraphs, Inputs, _Captured

LENGTHS = (5, 31, 64, 100, 150)  # index_topk is 32
LIMITS = (9, 30, 14, 21, 30)


class Pretended(DecodeGraphs):
    """``captured``: the shapes that were."""

    def _capture(self, num_sequences: int, num_pages: int, count: int) -> _Captured:
        inputs = self._empty(num_sequences, num_pages, count)
        graph: Any = Replayed(self, inputs)
        captured = _Captured(graph, inputs, graph.hidden)
        self._captured[num_sequences, num_pages, count] = captured
        return captured


class Replayed:
    def __init__(self, graphs: DecodeGraphs, inputs: Inputs) -> None:
        self._forward, self._inputs = graphs._forward, inputs
        self.hidden = self._forward(inputs)

    def replay(self) -> None:
        self.hidden.copy_(self._forward(self._inputs))


@pytest.mark.parametrize(("drafts", "flies"), [(0, False), (0, True), (1, False), (3, False)])
def test_steps_of_fixed_shapes_change_no_token(model: Path, drafts: int, flies: bool) -> None:
    options: dict[str, Any] = SMALL | {
        "kv_cache_dtype": "bf16", "num_speculative_tokens": drafts, "async_scheduling": flies
    }  # fmt: skip
    prompts = [random_tokens(length, length) for length in LENGTHS]
    params = [greedy(max_tokens=limit, logprobs=0) for limit in LIMITS]
    eager, engine = Engine(model, **options), Engine(model, **options)
    runner, size = engine._runner, engine.config.hidden_size
    with torch.inference_mode():
        graphs = Pretended(runner._decode, first=0, hidden=torch.empty(0, 0))
        draft_graphs = Pretended(runner._decode_draft, first=1, hidden=torch.empty(0, size))
    runner._graphs, runner._draft_graphs = graphs, draft_graphs
    expected, found = serve(eager, prompts, params), serve(engine, prompts, params)
    assert outputs(found) == outputs(expected)
    assert [one.accepted for one in found] == [one.accepted for one in expected]
    for one, other in zip(found, expected, strict=True):
        for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=2e-3)
    assert {count for _, _, count in graphs._captured} >= {1 + drafts}
    assert {shape[0] for shape in graphs._captured} >= {4, 8}
    assert {count for _, _, count in draft_graphs._captured} == ({1} if drafts else set())
