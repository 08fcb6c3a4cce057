"""Nothing grows with the number of requests that were served."""

import gc
import random
from pathlib import Path
from typing import Any

import pytest

from engine_models import random_tokens
from fourge import LLM, SamplingParams, StructuredOutputs

WARM, SERVED, TOGETHER = 300, 1000, 20
# Allocators keep pages of what was in use at once; 1000 requests that kept 8 kB each would be more.
MOST_GROWTH = 4 << 20


@pytest.mark.parametrize("options", [{"speculative_tokens": 2}, {"async_scheduling": True}])
def test_memory_returns_to_its_start_after_a_thousand_requests(
    tiny_glm: Path, options: dict[str, Any]
) -> None:
    llm = LLM(tiny_glm, device="cpu", cache_tokens=2048, max_num_batched_tokens=256, **options)
    choose = random.Random(0)
    prefixes = [random_tokens(70, seed, 2000) for seed in range(3)]
    serve(llm, WARM, choose, prefixes)
    before, entries = resident_bytes(), known_entries(llm)
    serve(llm, SERVED, choose, prefixes)
    assert resident_bytes() - before < MOST_GROWTH
    assert known_entries(llm) <= entries + 4
    stats = llm.stats()
    assert stats["finished"] == WARM + SERVED
    assert stats["cached_prompt_tokens"] > 0
    assert (stats["running"], stats["waiting"], stats["cache_usage"]) == (0, 0, 0)
    engine = llm.engine
    pool = engine._scheduler.pool
    assert (engine._requests, engine._in_flight) == ({}, None)
    assert all(pool.references(page) == 0 for page in range(1, pool.num_pages))
    assert len(pool._page) == len(pool._digest) == len(pool._reusable) < pool.num_pages


def serve(llm: LLM, count: int, choose: random.Random, prefixes: list[list[int]]) -> None:
    """Short requests of every kind, some at once; one in ten is aborted on its way."""
    engine = llm.engine
    for first in range(0, count, TOGETHER):
        for number in range(first, first + TOGETHER):
            tail = random_tokens(choose.randrange(1, 30), choose.randrange(1 << 30), 2000)
            prompt = choose.choice((*prefixes, [])) + tail
            engine.add(str(number), prompt, random_params(llm, choose))
        aborted = [str(choose.randrange(first, first + TOGETHER)) for _ in range(2)]
        while engine.has_work:
            engine.step()
            if aborted and choose.random() < 0.5:
                engine.abort(aborted.pop())


def random_params(llm: LLM, choose: random.Random) -> SamplingParams:
    wanted: dict[str, Any] = {
        "temperature": choose.choice((0.0, 1.0)), "seed": choose.randrange(1000),
        "max_tokens": choose.randrange(1, 7),
        "stop_token_ids": choose.sample(range(2000), 20),
    }  # fmt: skip
    some: dict[str, Any] = {
        "top_p": 0.9, "logprobs": 2, "prompt_logprobs": 1, "repetition_penalty": 1.1,
        "logit_bias": {3: 1.0}, "bad_words_token_ids": [[5], [6, 7]],
        "cache_salt": str(choose.random()),
        "structured_outputs": StructuredOutputs(regex="[a-z]{1,20}"),
    }  # fmt: skip
    return SamplingParams(**wanted, **{name: some[name] for name in choose.sample(list(some), 1)})


def known_entries(llm: LLM) -> int:
    """Of all lists, dicts and sets that the engine leads to, but for what pages were published."""
    pool = llm.engine._scheduler.pool
    skipped = {id(one) for one in (pool._page, pool._digest, pool._reusable, pool._plain)}
    entries, seen, left = 0, set(skipped), [llm.engine]
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, dict):
            entries += len(one)
            left += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset):
            entries += len(one)
            left += one
        elif type(one).__module__.startswith("fourge"):
            left += [getattr(one, name) for name in names_of(one)]
    return entries


def names_of(one: object) -> list[str]:
    slots = [name for kind in type(one).__mro__ for name in getattr(kind, "__slots__", ())]
    return [name for name in (*slots, *getattr(one, "__dict__", ())) if hasattr(one, name)]


def resident_bytes() -> int:
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")
