"""The machine: requests in, tokens out, one step at a time.

    schedule -> target model -> distributions -> which drafts stand, next token      (launched)
             -> commit, stop -> MTP layer -> drafts for the next step                 (landed)
With ``async_scheduling`` a step is launched before the one in flight lands: it takes the newest
tokens on the device, and the host learns them meanwhile, the only thing that it waits for. That a
request has come to its end is known a step late; what the step after gave it is dropped. A step
lands at once where what follows is decided on the host: by a grammar, penalties, bad words of
several tokens, or drafts.

A request that fails (numbers that are not finite, a grammar that breaks) ends with the reason
"error" and leaves the others alone. Not for several threads at once: see async_engine.py.
"""

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from fourge.checkpoint.metadata import read_config
from fourge.engine.cache import PagedCache, cached_layers
from fourge.engine.decoding import one_thread
from fourge.engine.drafting import Drafter
from fourge.engine.flight import Counters, Flight, Progressed, commit, launch
from fourge.engine.loader import Loader, OnProgress, stored_bytes
from fourge.engine.options import EngineOptions, engine_options, resolve
from fourge.engine.pages import PagePool
from fourge.engine.params import (
    Bounds,
    Defaults,
    SamplingParams,
    StructuredOutputs,
    checked,
    read_defaults,
)
from fourge.engine.request import Chunk, Matcher, Request
from fourge.engine.runner import Runner
from fourge.engine.scheduler import Scheduler
from fourge.errors import CheckpointError, EngineError, RequestError
from fourge.layerwise.budget import free_host_memory
from fourge.layerwise.machine import choose_device
from fourge.models.survey import survey_quantized

GENERATION_CONFIG = "generation_config.json"

CompileGrammar = Callable[[StructuredOutputs], Matcher]


class Engine:
    """A loaded checkpoint that serves requests."""

    def __init__(
        self,
        checkpoint: Path | str,
        *,
        compile_grammar: CompileGrammar | None = None,
        on_progress: OnProgress = lambda done, total: None,
        **given: Any,
    ) -> None:
        """``given``: see EngineOptions. Raises FourgeError subclasses, before anything large is
        read where that is possible.
        """
        self.options = engine_options(given)
        self._compile_grammar = compile_grammar
        folder, speculate = Path(checkpoint), self.options.num_speculative_tokens > 0
        overrides = self.options.hf_overrides
        source = survey_quantized(folder, mtp=speculate, overrides=overrides)
        self.config = source.config
        if speculate and not self.config.num_nextn_predict_layers:
            raise EngineError(
                f"{folder} has no MTP layer (num_nextn_predict_layers is 0): set"
                " num_speculative_tokens to 0."
            )
        self.defaults = _defaults(folder)
        self.device = choose_device(self.options.device)
        self.dtype = _dtype(self.options, self.device)
        layers = cached_layers(self.config, mtp=speculate)
        self.sizes = resolve(
            self.options,
            self.config,
            itemsize=self.dtype.itemsize,
            weights=stored_bytes(source, layers),
            free=_free_memory(self.device),
        )
        loader = Loader(
            source, layers, device=self.device, dtype=self.dtype, on_progress=on_progress
        )
        weights = loader.load(self.sizes.weight_budget)
        self.experts = weights.experts
        cache = PagedCache(
            self.config, kind=self.sizes.cache_kind, num_pages=self.sizes.num_pages,
            mtp=speculate, device=self.device,
        )  # fmt: skip
        positions = self.sizes.max_model_len + self.sizes.lookahead + 1
        self._runner = Runner(
            weights, self.config, cache, dtype=self.dtype, num_positions=positions,
            eager=self.options.enforce_eager,
        )  # fmt: skip
        self._scheduler = Scheduler(
            PagePool(self.sizes.num_pages),
            max_num_seqs=self.options.max_num_seqs,
            max_num_batched_tokens=self.options.max_num_batched_tokens,
            lookahead=self.sizes.lookahead,
            reuse_prefixes=self.options.enable_prefix_caching,
        )
        self.bounds = Bounds(
            vocab_size=self.config.vocab_size,
            max_model_len=self.sizes.max_model_len,
            defaults=self.defaults,
            has_grammars=compile_grammar is not None,
        )
        self._requests: dict[str, Request] = {}
        self._arrivals = 0
        self._in_flight: Flight | None = None
        self._flies = self.options.async_scheduling
        if self._flies is None:
            self._flies = self.device.type == "cuda" and not speculate
        self.counters = Counters(accepted_at=[0] * self.options.num_speculative_tokens)

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def check(self, prompt: Sequence[int], params: SamplingParams) -> SamplingParams:
        """``params`` with the checkpoint's defaults. RequestError: it could not be served."""
        return checked(prompt, params, self.bounds)

    def add(self, request_id: str, prompt: Sequence[int], params: SamplingParams) -> Request:
        """Let a request wait for its turn. RequestError: it could not be served."""
        if request_id in self._requests:
            raise RequestError(f"there is a request {request_id!r} already: give another id.")
        params = self.check(prompt, params)
        matcher = None
        if params.structured_outputs is not None and self._compile_grammar is not None:
            matcher = self._compile_grammar(params.structured_outputs)
        most = self.sizes.max_model_len
        eos = frozenset() if params.ignore_eos else self.defaults.eos_token_ids
        request = Request(
            request_id=request_id,
            tokens=list(prompt),
            num_prompt=len(prompt),
            max_length=min(most, len(prompt) + (params.max_tokens or most)),
            params=params,
            stop_tokens=eos | frozenset(params.stop_token_ids),
            seed=self._seed(params),
            arrival=self._arrivals,
            matcher=matcher,
            arrived_s=time.monotonic(),
        )
        self._arrivals += 1
        self._requests[request_id] = request
        self._scheduler.add(request)
        return request

    def abort(self, request_id: str) -> Progressed | None:
        """End a request now, with the reason "abort"; None if there is none of this id."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        request.finish_reason = "abort"
        self._leave(request)
        return Progressed(request, [], [], "abort")

    def fail(self, error: str) -> list[Progressed]:
        """End all running requests with the reason "error": a step of theirs failed as a whole."""
        failed = list(self._scheduler.running)
        for request in failed:
            request.finish_reason, request.error = "error", error
            self._leave(request)
        self._in_flight = None
        for request in self._requests.values():
            request.num_ahead = 0  # preempted meanwhile: the token will be chosen again
        return [Progressed(request, [], [], "error") for request in failed]

    @torch.inference_mode()
    def step(self) -> list[Progressed]:
        """One pass through the model; what it gave to those who got a token or ended. A step that
        stays in flight gives that at the next call.
        """
        chunks = self._scheduler.schedule()
        before, self._in_flight = self._in_flight, None
        assert chunks or before or not self._requests, "requests are left, but none can go on"
        chunks.sort(key=lambda chunk: chunk.num_tokens)  # neighbours of one size go together
        with one_thread() if self._runner.only_decodes(chunks) else nullcontext():
            launched = self._launch(chunks, before) if chunks else None
            progressed = self._land(before) if before else []
            if launched is None or not self._requests:
                return progressed
            if not self._flies or not launched.may_fly:
                return progressed + self._land(launched)
            self._in_flight = launched
            return progressed

    def stats(self) -> dict[str, Any]:
        """Counters, and how full the engine is."""
        pool, counters = self._scheduler.pool, self.counters
        usable = pool.num_pages - 1
        found = dict(vars(counters))
        accepted_at = found.pop("accepted_at")
        found |= {
            "running": len(self._scheduler.running),
            "waiting": len(self._scheduler.waiting),
            "cache_usage": 1 - pool.num_free / usable,
            "cache_tokens": usable * 64,
            "experts": self.experts,
        }
        if self.options.num_speculative_tokens:
            found["mean_acceptance_length"] = 1 + counters.accepted_tokens / max(1, counters.drafts)
            found["acceptance_per_position"] = [
                count / max(1, counters.drafts) for count in accepted_at
            ]
        return found

    def _launch(self, chunks: Sequence[Chunk], before: Flight | None) -> Flight:
        self.counters.steps += 1
        block = self.options.rejection_sample_method == "block"
        return launch(self._runner, chunks, before, block=block)

    def _land(self, flight: Flight) -> list[Progressed]:
        """Commit the tokens of those who are still there."""
        choices = flight.chosen.choices() if flight.chosen else []
        there = [chunk for chunk in flight.chunks if chunk.request.finish_reason is None]
        progressed = [
            commit(chunk, choice, self.counters)
            for chunk, choice in zip(flight.sampling, choices, strict=True)
            if chunk.request.finish_reason is None
        ]
        if self.options.num_speculative_tokens:
            self._draft(flight)
        for chunk in there:
            self._scheduler.committed(chunk.request)
            if chunk.request.finish_reason is not None:
                self._leave(chunk.request)
        return progressed

    def _draft(self, flight: Flight) -> None:
        drafting = [
            chunk.request for chunk in flight.sampling if chunk.request.finish_reason is None
        ]
        drafter = Drafter(drafting, greedy=self.options.draft_sample_method == "greedy")
        drafts_BK = self._runner.predict(
            flight.chunks, flight.hidden_TD, self.options.num_speculative_tokens, drafter.choose
        )
        if drafts_BK is not None:
            drafter.hand_over(drafts_BK)

    def _leave(self, request: Request) -> None:
        del self._requests[request.request_id]
        request.num_ahead = 0
        self._scheduler.remove(request)
        if not self._requests:
            self._in_flight = None
        self.counters.finished += 1
        self.counters.preemptions += request.num_preemptions

    def _seed(self, params: SamplingParams) -> int:
        if params.seed is not None:
            return params.seed
        if self.options.seed is not None:
            return self.options.seed + self._arrivals
        return secrets.randbits(62)


def _dtype(options: EngineOptions, device: torch.device) -> torch.dtype:
    if options.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return torch.float32 if options.dtype == "float32" else torch.bfloat16


def _free_memory(device: torch.device) -> int:
    return free_host_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def _defaults(folder: Path) -> Defaults:
    path = folder / GENERATION_CONFIG
    generation: Mapping[str, Any] = {}
    if path.exists():
        try:
            generation = json.loads(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from None
    return read_defaults(generation, read_config(folder)[1])
