"""What a request may ask for, and whether it makes sense.

Names are those of vllm's SamplingParams. A field that is None takes the checkpoint's
generation_config, or the neutral value where that says nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fourge.errors import RequestError

MOST_LOGPROBS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputs:
    """What the text must be: exactly one of a JSON schema, a regular expression, and a structural
    tag (as xgrammar.get_model_structural_tag gives it, or its JSON).
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    structural_tag: Any = None

    def __post_init__(self) -> None:
        given = [one for one in (self.json, self.regex, self.structural_tag) if one is not None]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs has {len(given)} of json, regex and structural_tag: give one."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop. temperature 0 is greedy, top_k 0 means all."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None  # None: all
    bad_words_token_ids: Sequence[Sequence[int]] = ()  # none of these follows in the output
    min_tokens: int = 0
    max_tokens: int | None = None  # None: as many as the context has room for
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None  # of the chosen token and of so many best
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: str = ""  # requests of different salts share no prefixes

    @property
    def has_penalties(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    @property
    def forbids_tokens(self) -> bool:
        return self.allowed_token_ids is not None or bool(self.bad_words_token_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """What a checkpoint says about sampling."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    eos_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What every request has to keep to, and what it gets where it says nothing."""

    vocab_size: int
    max_model_len: int
    defaults: Defaults
    has_grammars: bool


def read_defaults(generation: Mapping[str, Any], config: Mapping[str, Any]) -> Defaults:
    """From generation_config.json (may be empty) and config.json."""
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = [eos] if isinstance(eos, int) else list(eos or ())
    found = {
        name: generation[name]
        for name in ("temperature", "top_p", "top_k", "repetition_penalty")
        if generation.get(name) is not None
    }
    if generation.get("do_sample") is False:
        found["temperature"] = 0.0
    return Defaults(**found, eos_token_ids=frozenset(ids))


def checked(prompt: Sequence[int], params: SamplingParams, bounds: Bounds) -> SamplingParams:
    """``params`` with nothing open. RequestError: an engine of these bounds could not serve it."""
    vocab = bounds.vocab_size
    if not prompt:
        raise RequestError("the prompt is empty: give at least one token.")
    for token in prompt:
        if not is_token(token, vocab):
            raise RequestError(f"the prompt has {token!r}; tokens are 0 to {vocab - 1}.")
    longest = bounds.max_model_len - 1
    if len(prompt) > longest:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens; with one more to generate at most {longest} fit"
            f" (max_model_len {bounds.max_model_len}): shorten it."
        )
    if params.structured_outputs is not None and not bounds.has_grammars:
        raise RequestError("structured_outputs need a tokenizer, and this engine has none.")
    return resolved(params, bounds.defaults, vocab)


def resolved(params: SamplingParams, defaults: Defaults, vocab_size: int) -> SamplingParams:
    """``params`` with nothing open. RequestError: a value out of range, or two that contradict."""
    params = replace(
        params,
        **{
            name: getattr(defaults, name)
            for name in ("temperature", "top_p", "top_k", "repetition_penalty")
            if getattr(params, name) is None
        },
    )
    for name, (low, high) in _RANGES.items():
        _check_number(name, getattr(params, name), low, high)
    for name, low in _COUNTS.items():
        _check_count(name, getattr(params, name), low)
    _check_tokens(params, vocab_size)
    if params.top_p == 0 or params.repetition_penalty == 0:
        raise RequestError("top_p and repetition_penalty must be above 0.")
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise RequestError(
            f"min_tokens is {params.min_tokens}, which is more than max_tokens"
            f" {params.max_tokens}: lower the former or raise the latter."
        )
    if not isinstance(params.cache_salt, str):
        raise RequestError(f"cache_salt is {params.cache_salt!r}; it must be a text.")
    return params


_RANGES = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.0, 100.0),
}
_COUNTS = {
    "top_k": -1,
    "min_tokens": 0,
    "max_tokens": 1,
    "logprobs": 0,
    "prompt_logprobs": 0,
    "seed": -(1 << 63),
}


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        raise RequestError(f"{name} is {value!r}; it must be a number from {low:g} to {high:g}.")


def _check_count(name: str, value: object, low: int) -> None:
    if value is None and name not in ("top_k", "min_tokens"):
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise RequestError(f"{name} is {value!r}; it must be an integer of at least {low}.")
    if name in ("logprobs", "prompt_logprobs") and value > MOST_LOGPROBS:
        raise RequestError(f"{name} is {value}; at most {MOST_LOGPROBS} are given.")


def _check_tokens(params: SamplingParams, vocab_size: int) -> None:
    given = {
        "stop_token_ids": params.stop_token_ids,
        "logit_bias": params.logit_bias,
        "allowed_token_ids": params.allowed_token_ids or (),
        "bad_words_token_ids": [token for word in params.bad_words_token_ids for token in word],
    }
    for name, tokens in given.items():
        for token in tokens:
            if not is_token(token, vocab_size):
                raise RequestError(f"{name} has {token!r}; tokens are 0 to {vocab_size - 1}.")
    for token, bias in params.logit_bias.items():
        if (
            isinstance(bias, bool)
            or not isinstance(bias, int | float)
            or math.isnan(bias)
            or bias == math.inf
        ):
            raise RequestError(f"logit_bias of token {token} is {bias!r}; it must be a number.")
    if not all(params.bad_words_token_ids):
        raise RequestError("bad_words_token_ids has a word of no tokens: leave it out.")
    allowed = params.allowed_token_ids
    if allowed is not None:
        never = {word[0] for word in params.bad_words_token_ids if len(word) == 1}
        if not set(allowed) - never:
            raise RequestError(
                f"allowed_token_ids has {len(allowed)} tokens, and none that is no bad word: allow"
                " at least one, or leave it out."
            )


def is_token(token: object, vocab_size: int) -> bool:
    """Whether it is the id of a token."""
    return isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocab_size
