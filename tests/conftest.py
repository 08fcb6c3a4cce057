"""Shared fixtures: where the bundled example lies."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_glm() -> Path:
    """The bundled example model (examples/tiny-glm)."""
    return REPOSITORY / "examples" / "tiny-glm"
