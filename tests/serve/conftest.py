"""One server on the example model for all tests that need a real engine, and its clients."""

from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest
import torch

from fourge.serve.limits import Limits
from fourge.serve.run import Setup, load
from serving import Running, running


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Products of tiny models are over before a second thread has begun; the engine's process has
    as many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def server(tiny_glm: Path, one_thread: None) -> Iterator[Running]:
    setup = Setup(
        checkpoint=tiny_glm,
        names=("tiny-glm", "claude-small"),
        engine={"cache_tokens": 16384, "max_num_seqs": 16, "num_speculative_tokens": 2},
    )
    served = load(setup, lambda done, total: None)
    with running(served, limits=Limits(max_waiting=400)) as found:
        yield found
    served.engine.close()


@pytest.fixture(scope="session")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="session")
def http(server: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=60) as found:
        yield found
