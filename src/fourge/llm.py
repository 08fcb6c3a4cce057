"""The engine for people: prompts as text or tokens in, completions out.

    llm = LLM("tiny-glm-NVFP4", speculative_tokens=3)
    for completion in llm.generate(["Once upon"], SamplingParams(max_tokens=64)):
        print(completion.text)

Knows the tokenizer, which the engine does not. A checkpoint without one takes tokens alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from fourge.chat.grammar import GrammarCompiler
from fourge.chat.tokens import VOCABULARY_FILES, encode, load_tokenizer
from fourge.engine.engine import Engine
from fourge.engine.loader import OnProgress
from fourge.engine.params import SamplingParams, StructuredOutputs
from fourge.engine.request import Matcher, Request, TokenLogprobs
from fourge.errors import RequestError

Prompt = str | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class CompletionStats:
    """What one request took."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache
    output_tokens: int
    first_token_s: float | None
    total_s: float
    draft_tokens: int
    accepted_tokens: int
    preemptions: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What follows one prompt. ``finish_reason``: stop, length, abort or error."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str | None  # None where the checkpoint has no tokenizer
    finish_reason: str
    error: str | None
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs | None] | None
    stats: CompletionStats


class LLM:
    """A checkpoint of fourge's, or a BF16 one, ready to complete."""

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        device: str = "auto",
        cache_tokens: int | None = None,
        cache_dtype: str = "auto",
        speculative_tokens: int = 0,
        on_progress: OnProgress = lambda done, total: None,
        **options: Any,
    ) -> None:
        """``options``: see engine/options.py, named as vllm's. Raises FourgeError subclasses."""
        folder = Path(checkpoint)
        has_tokenizer = any((folder / name).is_file() for name in VOCABULARY_FILES)
        self.tokenizer = load_tokenizer(folder) if has_tokenizer else None
        self._grammars: GrammarCompiler | None = None
        self.engine = Engine(
            folder,
            compile_grammar=self.matcher if has_tokenizer else None,
            on_progress=on_progress,
            device=device,
            cache_tokens=cache_tokens,
            kv_cache_dtype=cache_dtype,
            num_speculative_tokens=speculative_tokens,
            **options,
        )
        self._served = 0

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete all prompts, in their order. RequestError, before anything is begun, if one of
        them cannot be served.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise RequestError("prompts must be a list of texts or of lists of tokens.")
        each = self._params_of(params, len(prompts))
        tokens = [self.tokens(prompt) for prompt in prompts]
        for own, chosen in zip(tokens, each, strict=True):
            self.engine.check(own, chosen)
        requests: list[Request] = []
        finished: dict[str, float] = {}
        try:
            for own, chosen in zip(tokens, each, strict=True):
                self._served += 1
                requests.append(self.engine.add(f"generate-{self._served}", own, chosen))
            while self.engine.has_work:
                for progressed in self.engine.step():
                    if progressed.finish_reason is not None:
                        finished[progressed.request.request_id] = monotonic()
        finally:  # interrupted, or failed as a whole: leave nothing behind
            for request in requests:
                self.engine.abort(request.request_id)
        return [self._completion(one, finished[one.request_id]) for one in requests]

    def tokens(self, prompt: Prompt) -> list[int]:
        """Tokens of a prompt; those of a text with what the tokenizer adds by itself."""
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise RequestError("the checkpoint has no tokenizer: give prompts as lists of tokens.")
        return encode(self.tokenizer, prompt, rendered=False)

    def text(self, tokens: Sequence[int]) -> str | None:
        """The text of tokens, special ones left out; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def stats(self) -> dict[str, Any]:
        """Counters since the model was loaded, and how full the engine is."""
        return self.engine.stats()

    def _params_of(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or SamplingParams()] * count
        if len(params) != count:
            raise RequestError(f"there are {count} prompts and {len(params)} SamplingParams.")
        return list(params)

    def matcher(self, wanted: StructuredOutputs) -> Matcher:
        """A grammar at its beginning; compiled grammars are kept. RequestError: it is malformed."""
        if self._grammars is None:
            assert self.tokenizer is not None
            self._grammars = GrammarCompiler(
                self.tokenizer,
                vocab_size=self.engine.config.vocab_size,
                stop_token_ids=self.engine.defaults.eos_token_ids,
            )
        return self._grammars.matcher(
            schema=wanted.json, regex=wanted.regex, structural_tag=wanted.structural_tag
        )

    def _completion(self, request: Request, finished_s: float) -> Completion:
        assert request.finish_reason is not None
        begun, first = request.arrived_s, request.first_token_s
        return Completion(
            prompt_token_ids=request.tokens[: request.num_prompt],
            token_ids=request.output,
            text=self.text(request.output),
            finish_reason=request.finish_reason,
            error=request.error,
            logprobs=None if request.params.logprobs is None else request.logprobs,
            prompt_logprobs=request.prompt_logprobs or None,
            stats=CompletionStats(
                prompt_tokens=request.num_prompt,
                cached_tokens=request.num_cached,
                output_tokens=request.num_output,
                first_token_s=None if first is None else first - begun,
                total_s=finished_s - begun,
                draft_tokens=request.drafted,
                accepted_tokens=request.accepted,
                preemptions=request.num_preemptions,
            ),
        )
