"""The checkpoint's own tokenizer, loaded and applied.

Local files only and never code from the checkpoint. What transformers has to say in warnings stays
off the user's terminal; what stops it becomes one CheckpointError. Knows nothing of messages.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fourge.errors import CheckpointError

if TYPE_CHECKING:
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
