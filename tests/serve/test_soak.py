"""Two hundred streams at once, many of them left on the way: nothing of them stays."""

import asyncio
import gc
import os
import random

import httpx2
import psutil

from serving import Running

STREAMS = 200
# Of this process and the engine's, in bytes. A leaked request keeps its tokens and grammars; 200 of
# them show.
GROWTH = 48 << 20


def test_streams_that_are_left_free_their_pages_and_memory(server: Running):
    asyncio.run(_rounds(server, 40))  # what a first round leaves in caches is none of a leak's
    server.service.served.engine.stats()
    before, memory = _state(server), _memory()
    finished, left = asyncio.run(_rounds(server, STREAMS))
    assert finished + left == STREAMS
    assert finished > 40
    assert left > 40
    asyncio.run(_until_idle(server))
    assert _state(server) == before
    gc.collect()
    assert _memory() - memory < GROWTH
    answer = httpx2.get(f"{server.url}/health")
    assert answer.status_code == 200


async def _rounds(server: Running, streams: int) -> tuple[int, int]:
    """How many came to their end, and how many were left."""
    choices = random.Random(streams)
    limits = httpx2.Limits(max_connections=streams)
    async with httpx2.AsyncClient(base_url=server.url, limits=limits, timeout=120) as http:
        ends = [choices.choice((None, None, 0, 1, 3, 9)) for _ in range(streams)]
        done = await asyncio.gather(
            *(_stream(http, number, end) for number, end in enumerate(ends))
        )
    return sum(done), len(done) - sum(done)


async def _stream(http: httpx2.AsyncClient, number: int, leave_after: int | None) -> bool:
    """Read a stream to its end, or leave it after so many lines."""
    body = {
        "model": "tiny-glm", "stream": True, "max_tokens": 8, "n": 1 + number % 2, "seed": number,
        "messages": [{"role": "user", "content": f"Line {number % 7}. " * (1 + number % 11)}],
    }  # fmt: skip
    lines = 0
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        if leave_after == 0:
            return False
        async for line in answer.aiter_lines():
            lines += 1
            if line == "data: [DONE]":
                return True
            if lines == leave_after:
                return False
    raise AssertionError("the stream broke off")


async def _until_idle(server: Running) -> None:
    for _ in range(200):
        under_way = server.stats["running"] + server.stats["waiting"]
        if under_way + server.service.admission.taken == 0:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("requests of clients that have left go on")


def _state(server: Running) -> dict[str, float]:
    return {name: server.stats[name] for name in ("running", "waiting", "cache_usage")}


def _memory() -> int:
    ours = psutil.Process(os.getpid())
    return sum(process.memory_info().rss for process in (ours, *ours.children()))
