"""Shared fixtures: checkpoints of GLM-5.1's size without their data."""

from pathlib import Path

import pytest

from fourge.launch.served import Served, look_at
from hollow_checkpoint import GLM_5_1, write_hollow_nvfp4


@pytest.fixture(scope="session")
def glm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GLM-5.1 in NVFP4 with a BF16 MTP layer: 232,670 tensors in 84 shards."""
    folder = tmp_path_factory.mktemp("hollow") / "GLM-5.1-NVFP4"
    write_hollow_nvfp4(folder, GLM_5_1, tensors_per_shard=2800)
    return folder


@pytest.fixture(scope="session")
def glm(glm_folder: Path) -> Served:
    return look_at(glm_folder)


@pytest.fixture(scope="session")
def tiny(tiny_glm: Path) -> Served:
    """The bundled example model."""
    return look_at(tiny_glm)
