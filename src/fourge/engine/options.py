"""How the engine is set up: options named as vllm names them, checked once.

``resolve`` turns what was asked for into sizes that fit the memory at hand. Formula: weights, then
cache pages, within gpu_memory_utilization of what is free (on the CPU, of the free memory).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from fourge.engine.cache import token_bytes
from fourge.engine.pages import pages_for
from fourge.errors import EngineError
from fourge.formats.cache_rows import PAGE_TOKENS
from fourge.layerwise.budget import format_bytes
from fourge.models.config import ModelConfig

CACHE_KINDS = ("auto", "bf16", "fp32", "fp8")
MOST_SPECULATIVE_TOKENS = 8
# Tokens of cache where nothing is said: as many as max_model_len needs, and at least these.
DEFAULT_CACHE_TOKENS = 64 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """What can be chosen. None: as large as model and memory allow."""

    device: str = "auto"  # auto, cpu, cuda
    dtype: str = "auto"  # auto (float32 on the CPU, bfloat16 on a GPU), float32, bfloat16
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2048
    gpu_memory_utilization: float = 0.8
    cache_tokens: int | None = None
    kv_cache_dtype: str = "auto"  # auto: the compute dtype; bf16, fp32, fp8
    enable_prefix_caching: bool = True
    enforce_eager: bool = False  # no CUDA graphs
    async_scheduling: bool | None = None  # None: on a GPU, without drafts
    num_speculative_tokens: int = 0
    draft_sample_method: str = "probabilistic"  # or greedy
    rejection_sample_method: str = "standard"  # or block
    hf_overrides: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None  # of requests that bring none


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What was resolved."""

    max_model_len: int
    num_pages: int  # page 0, which is nobody's, included
    lookahead: int  # slots beyond its length that a sequence may write to
    cache_kind: str
    weight_budget: int  # bytes for expanded weights


def engine_options(given: Mapping[str, Any]) -> EngineOptions:
    """Check names and values. EngineError: an unknown name, or a value that cannot be used."""
    known = [one.name for one in fields(EngineOptions)]
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
            raise EngineError(f"{name!r} is no option of the engine: {hint}")
    options = EngineOptions(**given)
    _check_choices(options)
    _check_numbers(options)
    if options.async_scheduling and options.num_speculative_tokens:
        raise EngineError(
            "async_scheduling is on and num_speculative_tokens is"
            f" {options.num_speculative_tokens}; drafts wait for the tokens before them: leave one"
            " of the two out."
        )
    if options.max_num_batched_tokens < options.max_num_seqs * (options.num_speculative_tokens + 1):
        raise EngineError(
            f"max_num_batched_tokens is {options.max_num_batched_tokens}; one step of"
            f" {options.max_num_seqs} sequences (max_num_seqs) with"
            f" {options.num_speculative_tokens} drafts each takes"
            f" {options.max_num_seqs * (options.num_speculative_tokens + 1)}: raise the former or"
            " lower the latter."
        )
    return options


def resolve(
    options: EngineOptions, config: ModelConfig, *, itemsize: int, weights: int, free: int
) -> Sizes:
    """Sizes for ``weights`` bytes as stored and ``free`` bytes of memory. EngineError if they do
    not go together.
    """
    mtp = options.num_speculative_tokens > 0
    kind = options.kv_cache_dtype
    if kind == "auto":
        kind = "fp32" if itemsize == 4 else "bf16"
    lookahead = 2 * options.num_speculative_tokens
    per_page = token_bytes(config, kind, mtp=mtp) * PAGE_TOKENS
    most = config.max_position_embeddings
    wanted = options.max_model_len or most
    if wanted > most:
        raise EngineError(
            f"max_model_len is {wanted}; the model has {most} positions: ask for at most that."
        )
    budget = int(free * options.gpu_memory_utilization) - weights
    fitting = budget // per_page - 1
    if options.cache_tokens is not None:
        num_pages = pages_for(options.cache_tokens)
    else:
        num_pages = min(fitting, pages_for(max(wanted + lookahead, DEFAULT_CACHE_TOKENS)))
    if num_pages > fitting or num_pages < 1:
        raise EngineError(
            f"{format_bytes(free)} of memory are free, of which"
            f" {options.gpu_memory_utilization:.0%} may be used; weights take"
            f" {format_bytes(weights)} and {max(num_pages, 1)} pages of"
            f" cache {format_bytes(max(num_pages, 1) * per_page)}: ask for fewer cache_tokens, an"
            " fp8 cache or a higher gpu_memory_utilization, or use a larger machine."
        )
    room = num_pages * PAGE_TOKENS - lookahead
    if options.max_model_len is not None and options.max_model_len > room:
        raise EngineError(
            f"max_model_len is {wanted}, but a cache of {num_pages} pages holds {max(room, 0)}"
            " tokens of one sequence: raise cache_tokens or lower max_model_len."
        )
    if room < 2:
        raise EngineError(
            f"cache_tokens is {options.cache_tokens}; with {options.num_speculative_tokens}"
            f" drafts needed are at least {lookahead + 2}."
        )
    return Sizes(
        max_model_len=min(wanted, room),
        num_pages=num_pages + 1,
        lookahead=lookahead,
        cache_kind=kind,
        weight_budget=budget + weights - num_pages * per_page,
    )


def _check_choices(options: EngineOptions) -> None:
    choices = {
        "device": ("auto", "cpu", "cuda"),
        "dtype": ("auto", "float32", "bfloat16"),
        "kv_cache_dtype": CACHE_KINDS,
        "draft_sample_method": ("probabilistic", "greedy"),
        "rejection_sample_method": ("standard", "block"),
        "enable_prefix_caching": (True, False),
        "enforce_eager": (True, False),
        "async_scheduling": (None, True, False),
    }
    for name, allowed in choices.items():
        value = getattr(options, name)
        if value not in allowed:
            raise EngineError(
                f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}."
            )


def _check_numbers(options: EngineOptions) -> None:
    for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "cache_tokens"):
        value = getattr(options, name)
        if value is not None and (not _is_integer(value) or value < 1):
            raise EngineError(f"{name} is {value!r}; it must be an integer of at least 1.")
    drafts = options.num_speculative_tokens
    if not _is_integer(drafts) or not 0 <= drafts <= MOST_SPECULATIVE_TOKENS:
        raise EngineError(
            f"num_speculative_tokens is {drafts!r}; it must be an integer from 0 to"
            f" {MOST_SPECULATIVE_TOKENS}."
        )
    share = options.gpu_memory_utilization
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise EngineError(f"gpu_memory_utilization is {share!r}; it must be above 0, at most 1.")
    if options.seed is not None and not _is_integer(options.seed):
        raise EngineError(f"seed is {options.seed!r}; it must be an integer or None.")
    if not isinstance(options.hf_overrides, Mapping):
        raise EngineError(f"hf_overrides is {options.hf_overrides!r}; it must be a mapping.")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
