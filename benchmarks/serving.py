"""What the server costs over the engine it serves, on the example model, in one run.

    .venv/bin/python benchmarks/serving.py [--threads 1] [--rounds 9] [--tokens 48]

1, 16 and 64 clients each ask, wait for the whole stream, and ask again. "bare": the same prompts
through AsyncEngine in this process, nothing but tokens. "served": streams of chat completions from
`fourge serve`; this process is the clients then, and shares the processor with it. The two take
turns, and the overhead is the median over rounds of what one took over the other beside it: on a
shared machine rounds of one kind differ by a third. Prints one JSON document: for both requests/s,
tokens/s, processor time a token (of this process, or of the server and its engine's), the median
and 99th percentile of the time between two tokens; and the overhead in requests/s and in processor
time.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch
from quantize_vs_modelopt import REPOSITORY, describe_run

from fourge import LLM, SamplingParams
from fourge.chat.template import normalise, render
from fourge.engine.async_engine import AsyncEngine

MODEL = REPOSITORY / "examples" / "tiny-glm"
CLIENTS = (1, 16, 64)
REQUESTS_EACH = 4
LEAST_REQUESTS = 12
SEQUENCES = 64

Tokens = Callable[[int], AsyncIterator[None]]  # one item a token of request number n


def main() -> None:
    parser = argparse.ArgumentParser(description="The server against its bare engine.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    llm = LLM(MODEL, device="cpu", max_num_seqs=SEQUENCES, enable_prefix_caching=False)
    engine = AsyncEngine(llm.engine)
    process, url = start_server(options.threads)
    try:
        report = {
            "benchmark": "serving",
            **describe_run(),
            "threads": options.threads,
            "rounds": options.rounds,
            "tokens": options.tokens,
            "clients": [
                measure(Bare(engine, llm), url, process.pid, clients, options)
                for clients in CLIENTS
            ],
        }
    finally:
        process.terminate()
        process.wait()
        engine.close()
    print(json.dumps(report, indent=2))


def start_server(threads: int) -> tuple[subprocess.Popen, str]:
    command = [
        sys.executable, "-m", "fourge.cli.main", "serve", str(MODEL), "--port", "0",
        "--device", "cpu", "--max-num-seqs", str(SEQUENCES), "--no-prefix-caching",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": f"{threads}"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("serving "):
            # The log goes on; nobody may let it wait.
            subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
            return process, line.split()[-1]
    raise SystemExit("the server did not start")


def measure(
    bare: "Bare", url: str, pid: int, clients: int, options: argparse.Namespace
) -> dict[str, Any]:
    server = psutil.Process(pid)
    ours, theirs = [psutil.Process()], [server, *server.children()]
    ways: dict[str, Callable[[], Awaitable[dict[str, float]]]] = {
        "bare": lambda: run(clients, lambda number: bare.tokens(number, options.tokens), ours),
        "served": lambda: run(clients, lambda number: stream(url, number, options.tokens), theirs),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):
        for name, way in ways.items():
            result = asyncio.run(way())  # type: ignore[arg-type]
            if number:  # the first one warms up
                found[name].append(result)
    return {
        "clients": clients,
        "overhead": median_excess(found, lambda one: 1 / one["requests_per_s"]),
        "processor_overhead": median_excess(found, lambda one: one["processor_s_per_token"]),
        **found,
    }


def median_excess(
    found: dict[str, list[dict[str, float]]], cost: Callable[[dict[str, float]], float]
) -> float:
    """Over rounds, how much more the server cost than the bare engine beside it."""
    pairs = zip(found["served"], found["bare"], strict=True)
    return statistics.median(cost(served) / cost(bare) for served, bare in pairs) - 1


async def run(
    clients: int, tokens_of: Tokens, processes: Sequence[psutil.Process]
) -> dict[str, float]:
    """Every client asks, reads to the end, and asks again; ``processes`` do the work."""
    total = max(LEAST_REQUESTS, clients * REQUESTS_EACH)
    numbers = iter(range(total))
    gaps: list[float] = []
    firsts: list[float] = []

    async def client() -> None:
        for number in numbers:
            last = begun = time.perf_counter()
            async for _ in tokens_of(number):
                now = time.perf_counter()
                (firsts if last == begun else gaps).append(now - last)
                last = now

    worked = processor_s(processes)
    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - begun
    worked = processor_s(processes) - worked
    ordered = sorted(gaps)
    return {
        "requests_per_s": total / seconds,
        "tokens_per_s": (len(gaps) + len(firsts)) / seconds,
        "processor_s_per_token": worked / (len(gaps) + len(firsts)),
        "first_token_s": statistics.median(firsts),
        "between_tokens_s": statistics.median(ordered),
        "between_tokens_p99_s": ordered[int(len(ordered) * 0.99)],
    }


def processor_s(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def question(number: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"Question {number}: " + "what do rivers carry? " * 8}]


class Bare:
    """The same prompts and tokens without a server."""

    def __init__(self, engine: AsyncEngine, llm: LLM) -> None:
        self._engine, self._llm = engine, llm

    async def tokens(self, number: int, tokens: int) -> AsyncIterator[None]:
        assert self._llm.tokenizer is not None
        text = render(self._llm.tokenizer, normalise(question(number)), add_generation_prompt=True)
        prompt = self._llm.tokens(text)
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=number, logprobs=0)
        async for update in self._engine.generate(prompt, params):
            for _ in update.token_ids:
                yield


async def stream(url: str, number: int, tokens: int) -> AsyncIterator[None]:
    """A plain client, so that little of the processor goes to it: one line of JSON a token."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    body = json.dumps(
        {
            "model": MODEL.name, "messages": question(number), "max_tokens": tokens, "stream": True,
            "ignore_eos": True, "seed": number, "logprobs": True,
        }
    ).encode()  # fmt: skip
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: fourge\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    async for line in reader:
        if b'"logprobs":{' in line:  # asked for, so that every token has its event
            yield
    writer.close()


if __name__ == "__main__":
    main()
