"""Continuous batching with a cache that is too small for everybody."""

import random
from pathlib import Path
from typing import Any

import pytest

from engine_models import SMALL, greedy, outputs, random_tokens, serve
from fourge.engine.engine import Engine
from fourge.engine.pages import PagePool, pages_for
from fourge.engine.params import SamplingParams
from fourge.engine.request import Request
from fourge.engine.scheduler import Scheduler


def make_request(number: int, length: int, **changes: Any) -> Request:
    return Request(
        request_id=str(number), tokens=list(range(length)), num_prompt=length, max_length=10**6,
        params=SamplingParams(cache_salt=str(number)), stop_tokens=frozenset(), seed=0,
        arrival=number, **changes,
    )  # fmt: skip


def make_scheduler(num_pages: int, **changes: Any) -> Scheduler:
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 100, "lookahead": 0}
    return Scheduler(PagePool(num_pages), **(options | changes), reuse_prefixes=True)


def advance(scheduler: Scheduler) -> list[tuple[str, int]]:
    """One step in which every request that may gets one token; (request, tokens) of the step."""
    chunks = scheduler.schedule()
    for chunk in chunks:
        chunk.request.num_computed = chunk.start + chunk.num_committed
        if chunk.samples:
            chunk.request.tokens.append(0)
        scheduler.committed(chunk.request)
    return [(chunk.request.request_id, chunk.num_tokens) for chunk in chunks]


def test_decoding_goes_first_and_prompts_share_what_is_left_by_arrival() -> None:
    scheduler = make_scheduler(40)
    for number, length in enumerate((10, 150, 30)):
        scheduler.add(make_request(number, length))
    assert advance(scheduler) == [("0", 10), ("1", 90)]
    assert advance(scheduler) == [("0", 1), ("1", 60), ("2", 30)]
    assert advance(scheduler) == [("0", 1), ("1", 1), ("2", 1)]


def test_no_more_sequences_run_than_may() -> None:
    scheduler = make_scheduler(40)
    for number in range(6):
        scheduler.add(make_request(number, 5))
    assert len(advance(scheduler)) == 4
    assert len(scheduler.waiting) == 2
    scheduler.remove(scheduler.running[0])
    assert ("4", 5) in advance(scheduler)


def test_the_latest_arrival_gives_way_and_comes_back() -> None:
    scheduler = make_scheduler(1 + 4)
    for number in range(2):
        scheduler.add(make_request(number, 60))
    advance(scheduler)
    advance(scheduler)
    first, second = scheduler.running
    while len(scheduler.running) == 2:
        advance(scheduler)
    assert scheduler.running == [first]
    assert (second.num_preemptions, second.num_computed, second.pages) == (1, 0, [])
    scheduler.remove(first)
    advance(scheduler)
    assert scheduler.running == [second]


def test_drafts_go_with_the_newest_token_or_wait() -> None:
    scheduler = make_scheduler(40, max_num_batched_tokens=12, lookahead=6)
    request = make_request(0, 11)
    request.drafts = [1, 2, 3]  # as after a preemption
    scheduler.add(request)
    assert [(one.num_committed, one.drafts, one.samples) for one in scheduler.schedule()] == [
        (10, (), False)
    ]
    request.num_computed = 10
    assert [(one.num_committed, one.drafts, one.samples) for one in scheduler.schedule()] == [
        (1, (1, 2, 3), True)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_random_schedules_end_and_leave_no_page_behind(seed: int) -> None:
    choose = random.Random(seed)
    scheduler = make_scheduler(1 + pages_for(400), max_num_batched_tokens=choose.choice((8, 33)))
    waiting = [make_request(number, choose.randrange(1, 200)) for number in range(60)]
    goal = {one.request_id: len(one.tokens) + choose.randrange(1, 200) for one in waiting}
    steps = 0
    while waiting or scheduler.running or scheduler.waiting:
        while waiting and choose.random() < 0.3:
            scheduler.add(waiting.pop())
        assert advance(scheduler) or not (scheduler.running or scheduler.waiting)
        for request in [*scheduler.running, *scheduler.waiting]:
            if len(request.tokens) >= goal[request.request_id] or choose.random() < 0.0005:
                scheduler.remove(request)
        steps += 1
        assert steps < 50_000
    assert scheduler.pool.num_free == scheduler.pool.num_pages - 1


@pytest.mark.parametrize("drafts", [0, 2])
def test_preemption_changes_no_token(model: Path, drafts: int) -> None:
    prompts = [random_tokens(50, number) for number in range(6)]
    params = [
        SamplingParams(temperature=1.0, seed=number, max_tokens=90, ignore_eos=True)
        for number in range(6)
    ]
    roomy = Engine(model, **SMALL, num_speculative_tokens=drafts)
    expected = outputs(serve(roomy, prompts, params))
    narrow = Engine(model, device="cpu", cache_tokens=512, num_speculative_tokens=drafts)
    requests = serve(narrow, prompts, params)
    assert sum(request.num_preemptions for request in requests) > 0
    assert outputs(requests) == expected
    assert narrow.stats()["cache_usage"] == 0


def test_a_known_prefix_is_not_computed_again_and_changes_no_token(model: Path) -> None:
    prefix = random_tokens(200, 1)
    prompts = [prefix + random_tokens(20, 10 + number) for number in range(3)]
    engine = Engine(model, **SMALL)
    plain = Engine(model, **SMALL, enable_prefix_caching=False)
    expected = outputs(serve(plain, prompts, greedy()))
    first, *_ = serve(engine, prompts[:1], greedy())
    others = serve(engine, prompts[1:], greedy())
    assert (first.num_cached, [one.num_cached for one in others]) == (0, [192, 192])
    assert outputs([first, *others]) == expected
    (salted,) = serve(engine, prompts[:1], greedy(cache_salt="other"))
    assert salted.num_cached == 0
    (continued,) = serve(engine, [first.tokens], greedy())
    assert continued.num_cached == 192  # 232 tokens, of which the last three full pages are known


def test_an_aborted_request_leaves_its_pages_and_the_others_alone(model: Path) -> None:
    prompts = [random_tokens(70, number) for number in range(3)]
    engine = Engine(model, **SMALL)
    expected = outputs(serve(engine, prompts, greedy()))
    requests = [engine.add(str(number), one, greedy()) for number, one in enumerate(prompts)]
    for _ in range(4):
        engine.step()
    assert engine.abort("1")
    assert not engine.abort("1")
    while engine.has_work:
        engine.step()
    assert requests[1].finish_reason == "abort"
    assert [requests[0].output, requests[2].output] == [expected[0], expected[2]]
    assert requests[1].output == expected[1][: len(requests[1].output)]
    assert engine.stats()["cache_usage"] == 0
