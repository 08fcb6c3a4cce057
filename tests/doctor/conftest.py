"""Quantized random checkpoints of every family, made once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from damage import Case
from random_checkpoint import published_config, write_checkpoint


@pytest.fixture(scope="session")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """A source of a family and its quantized checkpoint; nobody may change them."""
    made: dict[str, Case] = {}

    def make(family: str = "glm_moe_dsa", config: dict[str, Any] | None = None) -> Case:
        key = repr((family, config))
        if key not in made:
            folder = tmp_path_factory.mktemp("case")
            source = write_checkpoint(folder / "source", config=config or published_config(family))
            made[key] = Case.of(source, folder, vocab=256)
        return made[key]

    return make


@pytest.fixture
def own(make_case: Callable[..., Case], tmp_path: Path) -> Case:
    """A source and a checkpoint of one's own to damage."""
    return make_case().copy(tmp_path)
