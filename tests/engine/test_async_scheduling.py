"""Steps that are launched before the tokens of the last one are known give the same tokens."""

import asyncio
import random
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_models import SMALL, greedy, outputs, random_tokens, serve
from fourge.engine.async_engine import AsyncEngine
from fourge.engine.engine import Engine
from fourge.engine.params import SamplingParams
from fourge.engine.request import Request
from fourge.engine.runner import Runner
from fourge.engine.transfers import Fetched

FLYING = SMALL | {"async_scheduling": True}


def random_params(choose: random.Random) -> SamplingParams:
    """Anything that a request may ask for, what keeps a step on the ground included."""
    wanted: dict[str, Any] = {
        "temperature": choose.choice((0.0, 0.8, 1.2)), "seed": choose.randrange(1000),
        "max_tokens": choose.choice((1, 2, 60, 90)),
        "stop_token_ids": choose.sample(range(256), choose.choice((0, 0, 4))),
    }  # fmt: skip
    some: dict[str, Any] = {
        "top_k": 40, "top_p": 0.9, "min_p": 0.01, "min_tokens": min(5, wanted["max_tokens"]),
        "logit_bias": {7: 3.0}, "logprobs": 2, "prompt_logprobs": 1,
        "allowed_token_ids": list(range(200)), "presence_penalty": 0.5,
        "bad_words_token_ids": [[3], [9, 9]],
    }  # fmt: skip
    return SamplingParams(**wanted, **{name: some[name] for name in choose.sample(list(some), 2)})


def scenario(engine: Engine, seed: int) -> list[Request]:
    """Requests that arrive, of which some share a beginning and some are aborted, at any step."""
    choose = random.Random(seed)
    prefixes = [random_tokens(length, length) for length in (0, 70, 130)]
    waiting = []
    for number in range(24):
        prompt = choose.choice(prefixes) + random_tokens(choose.randrange(1, 60), number)
        aborted = choose.randrange(1, 15) if choose.random() < 0.2 else None
        waiting.append((prompt, random_params(choose), choose.randrange(30), aborted))
    requests: dict[int, Request] = {}
    step = 0
    while engine.has_work or len(requests) < len(waiting):
        for number, (prompt, params, arrives, aborted) in enumerate(waiting):
            if arrives == step:
                requests[number] = engine.add(str(number), prompt, params)
            if aborted is not None and arrives + aborted == step:
                engine.abort(str(number))
        engine.step()
        step += 1
    return [requests[number] for number in range(len(waiting))]


@pytest.mark.parametrize("seed", range(5))
def test_random_schedules_give_the_same_tokens(model: Path, seed: int) -> None:
    small = {"cache_tokens": 512, "max_num_seqs": 6, "max_num_batched_tokens": 48}
    grounded = scenario(Engine(model, **SMALL | small, async_scheduling=False), seed)
    engine = Engine(model, **FLYING | small)
    flown = scenario(engine, seed)
    assert sum(one.num_preemptions for one in flown) > 0
    assert sum(one.num_cached for one in flown) > 0
    for one, other in zip(grounded, flown, strict=True):
        if "abort" in (one.finish_reason, other.finish_reason):
            both = min(one.num_output, other.num_output)
            assert one.output[:both] == other.output[:both]
            continue
        assert (one.output, one.finish_reason) == (other.output, other.finish_reason)
        assert one.error is other.error is None
        for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
            assert mine.token_id == theirs.token_id
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert len(one.prompt_logprobs) == len(other.prompt_logprobs)
    assert {one.finish_reason for one in flown} == {"stop", "length", "abort"}
    assert engine.stats()["cache_usage"] == 0
    assert (engine._in_flight, engine._requests) == (None, {})
    assert all(one.num_ahead == 0 and one.pages == [] for one in flown)


def finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def events_of(engine: Engine, params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> str:
    """l: a step is launched, w: its tokens are waited for."""
    events: list[str] = []
    target, wait = Runner.target, Fetched.wait

    def launched(self: Runner, *step: Any) -> torch.Tensor:
        events.append("l")
        return target(self, *step)

    def waited(self: Fetched) -> Any:
        events.append("w")
        return wait(self)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "target", launched)
        patch.setattr(Fetched, "wait", waited)
        serve(engine, [random_tokens(20, 1)], params)
    return "".join(events)


def test_a_step_is_launched_before_the_last_one_is_waited_for(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flying, grounded = Engine(model, **FLYING), Engine(model, **SMALL)
    params = greedy(max_tokens=4)
    assert events_of(flying, params, monkeypatch) == "llwlwlww"
    assert events_of(grounded, params, monkeypatch) == "lwlwlwlw"
    for needing in ({"presence_penalty": 0.1}, {"bad_words_token_ids": [[1, 2]]}):
        params = greedy(max_tokens=4, **needing)
        assert events_of(flying, params, monkeypatch) == "lwlwlwlw"


def test_a_stop_is_seen_a_step_late_and_what_came_after_is_dropped(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, **FLYING)
    (free,) = serve(engine, [random_tokens(20, 1)], greedy(max_tokens=8))
    stop = free.output[3]
    params = greedy(max_tokens=8, stop_token_ids=[stop])
    upto = free.output.index(stop) + 1
    assert events_of(engine, params, monkeypatch).count("l") == upto + 1
    (stopped,) = serve(engine, [random_tokens(20, 1)], params)
    assert (stopped.output, stopped.finish_reason) == (free.output[:upto], "stop")
    assert engine._in_flight is None


def test_a_step_gives_what_the_one_before_chose(model: Path) -> None:
    engine = Engine(model, **FLYING)
    request = engine.add("one", random_tokens(20, 1), greedy(max_tokens=3))
    given = []
    while engine.has_work:
        given.append([(one.token_ids, one.finish_reason) for one in engine.step()])
        assert -1 not in request.tokens
    first, second, third = request.output
    assert given == [[], [([first], None)], [([second], None)], [([third], "length")]]


def test_numbers_that_are_not_finite_end_their_request_alone(model: Path) -> None:
    engine = Engine(model, **FLYING, enable_prefix_caching=False)
    prompts = [random_tokens(20, number) for number in range(3)]
    for temperature in (0.0, 1.0):
        params = greedy(temperature=temperature, seed=5)
        expected = outputs(serve(engine, prompts, params))
        used = {token for one in (*prompts, *expected) for token in one}
        poisoned = next(token for token in range(256) if token not in used)
        weights = engine._runner._weights.embedding
        kept = weights[poisoned].clone()
        weights[poisoned] = torch.nan
        requests = serve(engine, [prompts[0], [poisoned, 1, 2], *prompts[1:]], params)
        weights[poisoned] = kept
        assert (requests[1].finish_reason, requests[1].output) == ("error", [])
        assert requests[1].error == "the model's output is not finite"
        assert outputs([requests[0], *requests[2:]]) == expected


def test_a_step_that_fails_as_a_whole_ends_those_that_ran(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another, preempted in the same moment, has a token in flight: it is chosen again."""
    prompts = [random_tokens(50, number) for number in range(6)]
    params = [greedy(max_tokens=90, temperature=1.0, seed=number) for number in range(6)]
    expected = outputs(serve(Engine(model, **SMALL), prompts, params))
    engine = Engine(model, **FLYING | {"cache_tokens": 512})
    requests = [
        engine.add(str(number), *one)
        for number, one in enumerate(zip(prompts, params, strict=True))
    ]
    target = engine._runner.target

    def fail(*step: Any) -> torch.Tensor:
        if any(one.num_ahead for one in engine._scheduler.waiting):
            raise RuntimeError("out of memory")
        return target(*step)

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "target", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            finish(engine)
    failed = [one.request for one in engine.fail("the step failed")]
    assert failed
    left = [one for one in requests if one.finish_reason is None]
    assert left
    finish(engine)
    for request, output in zip(requests, expected, strict=True):
        if request in left:
            assert (request.output, request.finish_reason) == (output, "length")
    assert engine.stats()["cache_usage"] == 0


def test_streams_of_a_server_end_and_are_left(model: Path) -> None:
    prompts = [random_tokens(number + 3, number) for number in range(5)]
    expected = outputs(serve(Engine(model, **SMALL), prompts, greedy(max_tokens=30)))

    async def collect(engine: AsyncEngine, number: int) -> tuple[list[int], str | None]:
        tokens: list[int] = []
        reason = None
        params = greedy(max_tokens=30 if number < 4 else 3000)
        async with aclosing(engine.generate(prompts[number], params)) as updates:
            async for update in updates:
                tokens += update.token_ids
                reason = update.finish_reason
                if number == 4 and len(tokens) >= 30:
                    break
        return tokens, reason

    async def together(engine: AsyncEngine) -> Any:
        return await asyncio.gather(*(collect(engine, number) for number in range(5)))

    with AsyncEngine(Engine(model, **FLYING)) as engine:
        *others, left = asyncio.run(together(engine))
        assert others == [(tokens, "length") for tokens in expected[:4]]
        assert (left[0][:30], left[1]) == (expected[4], None)
        asyncio.run(collect(engine, 0))  # in whose time the other one ended
        assert engine.stats()["cache_usage"] == 0


def test_it_is_on_where_there_is_a_device_to_overlap_with(model: Path) -> None:
    assert not Engine(model, **SMALL)._flies
    assert Engine(model, **FLYING)._flies
