"""What the server serves: a loaded checkpoint, as far as the surfaces need to know it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, cast

from fourge.chat.tokens import tag_ids
from fourge.engine.async_engine import Result
from fourge.engine.params import SamplingParams, StructuredOutputs
from fourge.serve.errors import ApiError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerBase as Tokenizer


class TokenEngine(Protocol):
    """Tokens in, tokens out (engine_process.py, and Streams of engine/async_engine.py)."""

    def begin(
        self, prompt: Sequence[int], params: SamplingParams, receive: Callable[[Result], None]
    ) -> Callable[[], None]: ...

    async def compile(self, wanted: StructuredOutputs) -> None: ...

    def stats(self) -> dict[str, Any]: ...

    @property
    def is_alive(self) -> bool: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Served:
    """``check`` raises RequestError for what the engine would refuse. ``preferred``: sampling
    parameters of requests that name none; ``template_options``: likewise of the chat template.
    """

    names: tuple[str, ...]
    tokenizer: "Tokenizer"
    engine: TokenEngine
    check: Callable[[Sequence[int], SamplingParams], object]
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    num_speculative_tokens: int = 0
    preferred: Mapping[str, Any] = field(default_factory=dict)
    template_options: Mapping[str, Any] = field(default_factory=dict)
    created: int = 0  # Unix seconds
    details: Mapping[str, Any] = field(default_factory=dict)  # for /server_info

    @cached_property
    def tag_ids(self) -> dict[int, str]:
        """Token id -> tag of the protocol."""
        return tag_ids(self.tokenizer)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are not text."""
        added = self.tokenizer.added_tokens_decoder
        return frozenset(number for number, token in added.items() if token.special)

    @cached_property
    def most_characters(self) -> int | None:
        """No longer text fits the context: no token has more than the longest. None where a
        tokenizer drops some of a text, so that there is no such figure."""
        added = self.tokenizer.added_tokens_decoder.values()
        backend = cast("Backend", self.tokenizer.backend_tokenizer)
        if backend.normalizer is not None or any(token.lstrip or token.rstrip for token in added):
            return None
        return self.max_model_len * max(map(len, self.tokenizer.get_vocab()))

    def check_name(self, model: str | None) -> None:
        """ApiError 404 unless the model is served under this name."""
        if model is not None and model not in self.names:
            raise ApiError(
                404, f"the model {model!r} is not served here: use {', '.join(self.names)}.",
                param="model", code="model_not_found",
            )  # fmt: skip

    def token_text(self, token: int) -> str:
        """The token by itself; a part of a character is U+FFFD."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = str(self.tokenizer.decode([token]))
        return text

    @cached_property
    def _texts(self) -> dict[int, str]:
        """Of tokens that were asked for; of a whole vocabulary it takes a few megabytes."""
        return {}


def finite(logprob: float) -> float:
    """JSON has no infinity: what cannot come has vllm's figure."""
    return max(logprob, -9999.0)
