"""The checkpoint's own tokenizer, loaded and applied, both ways.

Local files only and never code from the checkpoint. What transformers has to say in warnings stays
off the user's terminal; what stops it becomes one CheckpointError. Knows nothing of messages.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tokenizers.decoders import DecodeStream

from fourge.chat.tags import STOPS, TAGS
from fourge.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerBase as Tokenizer

# Any one of these holds a vocabulary that transformers can read.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(folder: Path) -> "Tokenizer":
    """The tokenizer of the checkpoint in ``folder``; CheckpointError if there is none to use."""
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise CheckpointError(
            f"{folder} has no tokenizer (none of {', '.join(VOCABULARY_FILES)}): copy the model's"
            " tokenizer files there, or calibrate on records of input_ids, which need none."
        )
    from transformers import AutoTokenizer

    with quiet("transformers"):
        try:
            return AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        # tokenizers raises bare Exceptions; any of them means that the files cannot be used.
        except Exception as error:
            raise CheckpointError(
                f"the tokenizer in {folder} cannot be loaded ({first_line(error)}): fetch its"
                " files again, or calibrate on records of input_ids, which need none."
            ) from error


def encode(tokenizer: "Tokenizer", text: str, *, rendered: bool) -> list[int]:
    """Token ids of ``text``; only a text that is no ``rendered`` prompt gets a beginning added.

    A rendered prompt already holds the special tokens that its template wants; to plain text the
    tokenizer adds what it adds by itself (GLM: nothing, DeepSeek: a beginning-of-sentence token).
    """
    # verbose=False: a text longer than model_max_length is cut later, no reason to warn.
    return tokenizer(text, add_special_tokens=not rendered, verbose=False)["input_ids"]


def tag_ids(tokenizer: "Tokenizer") -> dict[int, str]:
    """Token id -> tag of the protocol, for those that are a token of this vocabulary."""
    vocabulary = tokenizer.get_vocab()
    return {vocabulary[tag]: tag for tag in (*TAGS, *STOPS) if tag in vocabulary}


# A character has four bytes at most, so that many tokens without one are broken bytes. A stream of
# them would be held for ever, and each one decoded with all before it.
_MOST_HELD = 8


class Detokenizer:
    """Token ids -> text, one at a time; bytes are held back until they are a whole character."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._backend = cast("Backend", tokenizer.backend_tokenizer)
        self._stream = DecodeStream(skip_special_tokens=False)
        self._held: list[int] = []

    def feed(self, token_id: int) -> str:
        """The text that is whole now, special tokens included; empty within a character."""
        self._held.append(token_id)
        text = self._stream.step(self._backend, token_id)
        if text is None:
            if len(self._held) < _MOST_HELD:
                return ""
            text = str(self._tokenizer.decode(self._held))
            self._stream = DecodeStream(skip_special_tokens=False)
        self._held = []
        return text

    def finish(self) -> str:
        """What an unfinished character decodes to: U+FFFD."""
        held, self._held = self._held, []
        return str(self._tokenizer.decode(held)) if held else ""


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """Keep the warnings of libraries off the terminal while they work for us."""
    loggers = [logging.getLogger(library) for library in libraries]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def first_line(error: Exception) -> str:
    """What an exception of another library says, cut to one line."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
