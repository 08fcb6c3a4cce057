"""A server from start to end: bind, load beside the event loop, serve, drain, close.

The address is bound first, so a port that is taken costs no loading; /health says 503 until the
model is there. SIGTERM and SIGINT let the requests under way end (for ``drain_s`` at most); a
second one ends them at once.
"""

import asyncio
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from fourge.chat.template import normalise, render
from fourge.chat.tokens import VOCABULARY_FILES, load_tokenizer
from fourge.checkpoint.header import check_folder
from fourge.engine.loader import OnProgress
from fourge.engine.params import Defaults, SamplingParams, resolved
from fourge.errors import CheckpointError, EngineError, RequestError
from fourge.serve.app import create_app
from fourge.serve.engine_process import EngineProcess
from fourge.serve.limits import Limits
from fourge.serve.served import Served
from fourge.serve.service import Service

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_NOT_PREFERRED = {"structured_outputs", "seed", "logprobs", "prompt_logprobs", "cache_salt"}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the command line says. ``engine``: see engine/options.py."""

    checkpoint: Path
    names: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    preferred: Mapping[str, Any] = field(default_factory=dict)
    template_options: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)


def serve(setup: Setup, *, on_progress: OnProgress, on_ready: Callable[[str], None]) -> None:
    """Serve until a signal says otherwise. ``on_ready`` gets the URL. Raises FourgeError
    subclasses, and OSError if the address cannot be had."""
    with _bound(setup.host, setup.port) as listener:
        log = logging.getLogger("fourge.serve")
        log.setLevel(logging.INFO)
        log.addHandler(logging.StreamHandler(sys.stderr))
        asyncio.run(_serve(setup, listener, on_progress, on_ready))


def load(setup: Setup, on_progress: OnProgress) -> Served:
    """The checkpoint, ready to serve, in a process of its own. What can be refused without its
    weights is refused before they are loaded."""
    tokenizer = _tokenizer(setup)
    preferred = preferred_params(setup.preferred)
    options = dict(setup.engine)
    options["cache_dtype"] = options.pop("kv_cache_dtype", "auto")
    options["speculative_tokens"] = options.pop("num_speculative_tokens", 0)
    engine = EngineProcess(setup.checkpoint, options, on_progress)
    try:
        engine.check([0], preferred)  # its tokens too, now that the vocabulary is known
        return _served(setup, tokenizer, engine)
    except BaseException:
        engine.close()
        raise


def _tokenizer(setup: Setup) -> "Tokenizer":
    check_folder(setup.checkpoint)
    if not any((setup.checkpoint / name).is_file() for name in VOCABULARY_FILES):
        raise CheckpointError(
            f"{setup.checkpoint} has no tokenizer, and a server needs one: copy the model's"
            " tokenizer files there."
        )
    tokenizer = load_tokenizer(setup.checkpoint)
    if setup.template_options:
        hello = normalise([{"role": "user", "content": "Hello"}])
        render(tokenizer, hello, add_generation_prompt=True, options=setup.template_options)
    return tokenizer


def _served(setup: Setup, tokenizer: "Tokenizer", engine: EngineProcess) -> Served:
    facts = engine.facts
    from_checkpoint = {
        name: getattr(facts.bounds.defaults, name)
        for name in ("temperature", "top_p", "top_k", "repetition_penalty")
    }
    return Served(
        names=setup.names or (setup.checkpoint.resolve().name,),
        tokenizer=tokenizer,
        engine=engine,
        check=engine.check,
        vocab_size=facts.bounds.vocab_size,
        max_model_len=facts.bounds.max_model_len,
        max_num_seqs=facts.max_num_seqs,
        num_speculative_tokens=facts.num_speculative_tokens,
        preferred=from_checkpoint | dict(setup.preferred),
        template_options=setup.template_options,
        created=int(time.time()),
        details=facts.details,
    )


def preferred_params(preferred: Mapping[str, Any]) -> SamplingParams:
    """RequestError: a name that is no default for sampling, or a value out of range; whether the
    model has the tokens is not known here."""
    known = {one.name for one in fields(SamplingParams)} - _NOT_PREFERRED
    unknown = sorted(preferred.keys() - known)
    if unknown:
        raise RequestError(
            f"the preferred sampling parameters have {', '.join(unknown)}; known are"
            f" {', '.join(sorted(known))}."
        )
    params = SamplingParams(**preferred)
    resolved(params, Defaults(), sys.maxsize)
    return params


async def _serve(
    setup: Setup, listener: socket.socket, on_progress: OnProgress,
    on_ready: Callable[[str], None],
) -> None:  # fmt: skip
    service = Service(setup.limits, setup.api_keys)
    server = _Server(http_config(service))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.force_exit = service.draining
        service.draining = server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)

    def progress(done: int, total: int) -> None:
        if server.should_exit:
            raise EngineError("the server was stopped while it loaded.")
        on_progress(done, total)

    loading = asyncio.create_task(asyncio.to_thread(load, setup, progress))
    try:
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            service.begin_serving(loading.result())
            host, port = listener.getsockname()[:2]
            on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        await serving
    finally:
        server.should_exit = True
        await asyncio.gather(serving, loading, return_exceptions=True)
        await asyncio.to_thread(service.close)


def http_config(service: Service) -> uvicorn.Config:
    """h11, though httptools takes a twentieth less time: uvicorn bounds the headers that h11 reads
    (64 KiB), and nothing bounds those of httptools."""
    return uvicorn.Config(
        create_app(service), http="h11", ws="none", lifespan="off", log_config=None,
        access_log=False, server_header=False,
        timeout_graceful_shutdown=round(service.limits.drain_s),
    )  # fmt: skip


class _Server(uvicorn.Server):
    """uvicorn without its own signals: it would end the process by raising them again."""

    @contextmanager
    def capture_signals(self) -> Any:
        yield


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen: {error.strerror}", f"{host}:{port}") from None
    return listener
