"""The engine on a GPU, with packed experts and CUDA graphs, against float32 on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine_models import SMALL, greedy, pack_experts, random_tokens, serve
from fourge.engine import graphs
from fourge.engine.engine import Engine
from fourge.engine.request import Request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU = SMALL | {"device": "cuda"}
VOCAB = 2000
# index_topk of the example is 64; contexts below it and several times above.
PROMPTS = [random_tokens(length, length, VOCAB) for length in (5, 40, 150, 300)]


@pytest.fixture(scope="module")
def packed(tiny_glm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_experts(tiny_glm, tmp_path_factory.mktemp("packed") / "model", lambda *_: True)


def decoded(engine: Engine, **changes: Any) -> list[Request]:
    """Greedy text of all prompts, with its log probabilities."""
    return serve(engine, PROMPTS, greedy(**({"logprobs": 0, "max_tokens": 24} | changes)))


def distance(requests: list[Request], exact: Engine) -> float:
    """Mean distance of their log probabilities to those of ``exact`` for the same tokens."""
    wanted = greedy(max_tokens=1, prompt_logprobs=0)
    again = serve(exact, [one.tokens for one in requests], wanted)
    total, count = 0.0, 0
    for request, whole in zip(requests, again, strict=True):
        known = whole.prompt_logprobs[request.num_prompt :]
        for mine, theirs in zip(request.logprobs, known, strict=True):
            assert theirs is not None
            total, count = total + abs(mine.logprob - theirs.logprob), count + 1
    return total / count


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("drafts", [0, 2])
def test_what_is_decoded_is_what_the_model_says(
    packed: Path, kind: str, eager: bool, drafts: int
) -> None:
    options: dict[str, Any] = {"enforce_eager": eager, "num_speculative_tokens": drafts}
    engine = Engine(packed, **GPU, kv_cache_dtype=kind, **options)
    assert engine.experts == "packed"
    assert 0 < distance(decoded(engine), Engine(packed, **SMALL)) < 0.1
    captured = engine._runner._graphs
    assert (captured is None) == eager
    if captured is not None:
        assert {count for _, _, count in captured._captured} >= {1 + drafts}
    captured = engine._runner._draft_graphs
    assert (captured is None) == (eager or not drafts)
    if captured is not None:
        assert {count for _, _, count in captured._captured} == {1}


def test_graphs_of_any_company_give_what_eager_steps_give(packed: Path) -> None:
    """Sequences that end at different times: graphs of 4, 2 and 1 of them, some filled up."""
    exact = Engine(packed, **SMALL)
    engine = Engine(packed, **GPU)
    lengths = [greedy(logprobs=0, max_tokens=count) for count in (9, 14, 21, 30)]
    for _ in range(2):  # the second time, all graphs are there
        assert distance(serve(engine, PROMPTS, lengths), exact) < 0.1
    assert engine._runner._graphs is not None
    assert {shape[0] for shape in engine._runner._graphs._captured} == {1, 2, 4}


def test_steps_over_many_keys_are_left_to_eager_ones(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST_KEYS", 2 * graphs.LEAST_PAGES * 64)
    engine = Engine(packed, **GPU)
    lengths = [greedy(logprobs=0, max_tokens=count) for count in (9, 9, 9, 20)]
    assert distance(serve(engine, PROMPTS, lengths), Engine(packed, **SMALL)) < 0.1
    assert engine._runner._graphs is not None
    assert {shape[0] for shape in engine._runner._graphs._captured} == {1}


def test_layers_of_either_kind_of_experts_and_of_both(tiny_glm: Path, tmp_path: Path) -> None:
    """A layer that holds both kinds is kept as stored; such a model has no graphs."""
    ways = {"either": lambda layer, _: layer < 3, "both": lambda _, expert: expert < 9}
    for name, chosen in ways.items():
        folder = pack_experts(tiny_glm, tmp_path / name, chosen)
        engine = Engine(folder, **GPU)
        assert (engine._runner._graphs is None) == (name == "both")
        assert distance(decoded(engine), Engine(folder, **SMALL)) < 0.1


def test_without_packed_experts_and_in_float32(tiny_glm: Path, packed: Path) -> None:
    engine = Engine(tiny_glm, **GPU)
    assert distance(decoded(engine), Engine(tiny_glm, **SMALL)) < 0.1
    precise = Engine(packed, **GPU, dtype="float32")
    assert precise._runner._graphs is None
    assert distance(decoded(precise), Engine(packed, **SMALL)) < 1e-2


def test_drafts_that_share_a_selection_run_without_graphs(packed: Path) -> None:
    shared = {"index_share_for_mtp_iteration": True}
    engine = Engine(packed, **GPU, num_speculative_tokens=3, hf_overrides=shared)
    assert engine._runner._draft_graphs is None
    assert distance(decoded(engine), Engine(packed, **SMALL)) < 0.1
    assert engine.counters.accepted_tokens > 0


@pytest.mark.parametrize("eager", [True, False])
def test_steps_in_flight_give_the_same_tokens(packed: Path, eager: bool) -> None:
    flying = Engine(packed, **GPU, enforce_eager=eager)
    grounded = Engine(packed, **GPU, enforce_eager=eager, async_scheduling=False)
    assert (flying._flies, grounded._flies) == (True, False)
    sampled = {"temperature": 0.8, "top_p": 0.9, "seed": 1}
    for changes in ({}, sampled):
        found, expected = decoded(flying, **changes), decoded(grounded, **changes)
        assert [one.output for one in found] == [one.output for one in expected]
        assert [one.logprobs for one in found] == [one.logprobs for one in expected]


SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "all": {
        "temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 1, "logprobs": 2,
        "logit_bias": {5: 1.0}, "min_tokens": 30, "stop_token_ids": [7],
        "allowed_token_ids": list(range(1000)), "bad_words_token_ids": [[3]],
    },
}  # fmt: skip


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("eager", [True, False])
def test_nothing_but_the_tokens_is_waited_for(packed: Path, sampling: str, eager: bool) -> None:
    """torch raises where a call waits for the device; waiting for an event is none."""
    engine = Engine(packed, **GPU, enforce_eager=eager)
    decoded(
        engine, **({"max_tokens": 40} | SAMPLINGS[sampling])
    )  # what is set up at first is there
    for number, prompt in enumerate(PROMPTS):
        engine.add(str(number), prompt, greedy(**({"max_tokens": 40} | SAMPLINGS[sampling])))
    for _ in range(4):
        engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            assert len(engine.step()) == len(PROMPTS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    while engine.has_work:
        engine.step()


def test_numbers_that_are_not_finite_harm_nobody_else(packed: Path) -> None:
    """Neither beside them nor in their pages."""
    engine = Engine(packed, **GPU | {"cache_tokens": 1024}, enable_prefix_caching=False)
    expected = [one.output for one in decoded(engine)]
    used = {token for tokens in (*PROMPTS, *expected) for token in tokens}
    poisoned = next(token for token in range(VOCAB) if token not in used)
    engine._runner._weights.embedding[poisoned] = torch.nan
    failed = serve(engine, [[poisoned] * 300] * 3, greedy())
    assert [one.finish_reason for one in failed] == ["error"] * 3
    assert [one.output for one in decoded(engine)] == expected


def test_memory_returns_after_many_requests(packed: Path) -> None:
    engine = Engine(packed, **GPU)
    decoded(engine)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        decoded(engine)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
