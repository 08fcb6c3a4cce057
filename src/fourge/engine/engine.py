"""The machine: requests in, tokens out, one step at a time.

    schedule -> target model -> distributions -> which drafts stand, next token
             -> commit, stop -> MTP layer -> drafts for the next step
A request that fails (numbers that are not finite, a grammar that breaks) ends with the reason
"error" and leaves the others alone. Not for several threads at once: see async_engine.py.
"""

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fourge.checkpoint.metadata import read_config
from fourge.engine import choosing
from fourge.engine.cache import PagedCache, cached_layers
from fourge.engine.decoding import one_thread
from fourge.engine.loader import Loader, OnProgress, stored_bytes
from fourge.engine.options import EngineOptions, engine_options, resolve
from fourge.engine.pages import PagePool
from fourge.engine.params import (
    Defaults,
    SamplingParams,
    StructuredOutputs,
    is_token,
    read_defaults,
    resolved,
)
from fourge.engine.request import Chunk, Matcher, Request, TokenLogprobs
from fourge.engine.runner import Runner
from fourge.engine.scheduler import Scheduler
from fourge.errors import CheckpointError, EngineError, RequestError
from fourge.layerwise.budget import free_host_memory
from fourge.layerwise.machine import choose_device
from fourge.models.survey import survey_quantized

GENERATION_CONFIG = "generation_config.json"

CompileGrammar = Callable[[StructuredOutputs], Matcher]


@dataclass(frozen=True, slots=True)
class Progressed:
    """What one step gave one request; ``finish_reason`` as it was then, None if it goes on."""

    request: Request
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None


@dataclass
class Counters:
    """Since the engine was set up."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    finished: int = 0
    drafts: int = 0  # times that drafts were verified
    draft_tokens: int = 0
    accepted_tokens: int = 0


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
        self._requests: dict[str, Request] = {}
        self._arrivals = 0
        self.counters = Counters()
        self.accepted_at = [0] * self.options.num_speculative_tokens

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def check(self, prompt: Sequence[int], params: SamplingParams) -> SamplingParams:
        """``params`` with the checkpoint's defaults. RequestError: it could not be served."""
        vocab = self.config.vocab_size
        if not prompt:
            raise RequestError("the prompt is empty: give at least one token.")
        for token in prompt:
            if not is_token(token, vocab):
                raise RequestError(f"the prompt has {token!r}; tokens are 0 to {vocab - 1}.")
        longest = self.sizes.max_model_len - 1
        if len(prompt) > longest:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; with one more to generate at most {longest}"
                f" fit (max_model_len {self.sizes.max_model_len}): shorten it."
            )
        if params.structured_outputs is not None and self._compile_grammar is None:
            raise RequestError("structured_outputs need a tokenizer, and this engine has none.")
        return resolved(params, self.defaults, vocab)

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
        return [Progressed(request, [], [], "error") for request in failed]

    @torch.inference_mode()
    def step(self) -> list[Progressed]:
        """One pass through the model; what it gave to those who got a token or ended."""
        chunks = self._scheduler.schedule()
        if not chunks:
            assert not self._requests, "requests are left, but none can go on"
            return []
        chunks.sort(key=lambda chunk: chunk.num_tokens)  # neighbours of one size go together
        with one_thread() if self._runner.only_decodes(chunks) else nullcontext():
            return self._run(chunks)

    def stats(self) -> dict[str, Any]:
        """Counters, and how full the engine is."""
        pool, counters = self._scheduler.pool, self.counters
        usable = pool.num_pages - 1
        found: dict[str, Any] = dict(vars(counters))
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
                count / max(1, counters.drafts) for count in self.accepted_at
            ]
        return found

    def _run(self, chunks: Sequence[Chunk]) -> list[Progressed]:
        hidden_TD = self._runner.target(chunks)
        self._describe_prompts(chunks, hidden_TD)
        progressed = self._choose(chunks, hidden_TD)
        self.counters.steps += 1
        if self.options.num_speculative_tokens:
            self._draft(chunks, hidden_TD)
        for chunk in chunks:
            request = chunk.request
            if not chunk.samples:
                request.num_computed = chunk.start + chunk.num_committed
            self._scheduler.committed(request)
            if request.finish_reason is not None:
                self._leave(request)
        return progressed

    def _choose(self, chunks: Sequence[Chunk], hidden_TD: torch.Tensor) -> list[Progressed]:
        """Choose tokens for those chunks that end with a request's newest, and commit them."""
        sampling = [chunk for chunk in chunks if chunk.samples]
        if not sampling:
            return []
        rows, start = [], 0
        for chunk in chunks:
            start += chunk.num_tokens
            if chunk.samples:
                rows += range(start - len(chunk.drafts) - 1, start)
        chosen_ND = hidden_TD if len(rows) == len(hidden_TD) else hidden_TD[rows]
        logits_NV = self._runner.logits(chosen_ND)
        choices = choosing.choose(
            sampling, logits_NV, block=self.options.rejection_sample_method == "block"
        )
        return [
            self._commit(chunk, choice) for chunk, choice in zip(sampling, choices, strict=True)
        ]

    def _commit(self, chunk: Chunk, choice: choosing.Choice) -> Progressed:
        request = chunk.request
        request.num_computed = len(request.tokens)
        request.drafts, request.draft_probs_KV = [], None
        if choice.error is not None:
            request.finish_reason, request.error = "error", choice.error
            return Progressed(request, [], [], "error")
        if chunk.drafts:
            self._count(request, len(chunk.drafts), len(choice.token_ids) - 1)
        if request.first_token_s is None:
            request.first_token_s = time.monotonic()
            self.counters.prompt_tokens += request.num_prompt
            self.counters.cached_prompt_tokens += request.num_cached
        kept: list[int] = []
        for token in choice.token_ids:
            kept.append(token)
            request.tokens.append(token)
            request.finish_reason = choosing.end(request, token)
            if request.finish_reason is not None:
                break
        request.num_computed += len(kept) - 1
        self.counters.output_tokens += len(kept)
        logprobs = choice.logprobs[: len(kept)]
        request.logprobs += logprobs
        return Progressed(request, kept, logprobs, request.finish_reason)

    def _draft(self, chunks: Sequence[Chunk], hidden_TD: torch.Tensor) -> None:
        drafting = [
            chunk.request
            for chunk in chunks
            if chunk.samples and chunk.request.finish_reason is None
        ]
        drafter = choosing.Drafter(drafting, greedy=self.options.draft_sample_method == "greedy")
        drafts_BK = self._runner.predict(
            chunks, hidden_TD, self.options.num_speculative_tokens, drafter.choose
        )
        if drafts_BK is not None:
            drafter.hand_over(drafts_BK)

    def _count(self, request: Request, drafted: int, accepted: int) -> None:
        request.drafted += drafted
        request.accepted += accepted
        self.counters.drafts += 1
        self.counters.draft_tokens += drafted
        self.counters.accepted_tokens += accepted
        for position in range(accepted):
            self.accepted_at[position] += 1

    def _describe_prompts(self, chunks: Sequence[Chunk], hidden_TD: torch.Tensor) -> None:
        """Log probabilities of prompt tokens, of which the first has none."""
        start = 0
        for chunk in chunks:
            request, first = chunk.request, start
            start += chunk.num_tokens
            wanted = request.params.prompt_logprobs
            done = len(request.prompt_logprobs)
            if wanted is None or done >= request.num_prompt:
                continue
            if not done:
                request.prompt_logprobs.append(None)
            stop = min(chunk.start + chunk.num_committed, request.num_prompt - 1)
            tokens = request.tokens[chunk.start + 1 : stop + 1]
            begin = len(request.prompt_logprobs) - 1 - chunk.start  # preempted: some are known
            if begin < len(tokens):
                hidden_ND = hidden_TD[first + begin : first + len(tokens)]
                request.prompt_logprobs += choosing.describe(
                    self._runner.logits(hidden_ND), tokens[begin:], wanted
                )

    def _leave(self, request: Request) -> None:
        del self._requests[request.request_id]
        self._scheduler.remove(request)
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
