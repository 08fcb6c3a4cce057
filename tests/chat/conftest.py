"""The tokenizer of the example model, loaded once."""

from pathlib import Path

import pytest

from fourge.chat.tokens import load_tokenizer

TINY_GLM = Path(__file__).parents[2] / "examples" / "tiny-glm"


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(TINY_GLM)
