"""A checkpoint with every record: quantized, examined against its source, evaluated."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fourge_process import run
from random_checkpoint import published_config, write_checkpoint, write_input_ids

SOURCE_CARD = "---\nlicense: mit\nbase_model: some-org/Some-Model\n---\n\n# The source's own card\n"


class Recorded(NamedTuple):
    """A checkpoint, and the records that lie in it."""

    folder: Path
    source: Path

    def record(self, name: str) -> Any:
        return json.loads((self.folder / "fourge" / name).read_text())

    @property
    def evaluation(self) -> Any:
        (path,) = (self.folder / "fourge" / "evaluation").glob("*.json")
        return json.loads(path.read_text())

    def edit(self, name: str, change: Callable[[Any], None]) -> None:
        """Apply ``change`` to a record."""
        path = self.folder / "fourge" / name
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    @property
    def card(self) -> str:
        return (self.folder / "README.md").read_text()

    @property
    def page(self) -> str:
        return (self.folder / "fourge" / "report.html").read_text()


def good(*arguments: object) -> None:
    done = run(*arguments)
    assert done.status == 0, done.stderr


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Nobody may change it."""
    folder = tmp_path_factory.mktemp("recorded")
    config = published_config(index_topk=32)
    source = write_checkpoint(folder / "source", config=config)
    (source / "README.md").write_text(SOURCE_CARD)
    ids = {"vocab": config["vocab_size"], "length": 70}
    calibration = write_input_ids(folder / "calibration.jsonl", sequences=4, **ids)
    data = write_input_ids(folder / "held-out.jsonl", sequences=4, seed=1, **ids)
    out = folder / "Some-Model-NVFP4"
    good("quantize", source, out, "--method", "max", "--data", calibration)
    good("doctor", out, "--source", source, "--record")
    good("evaluate", out, "--reference", source, "--data", data)
    return Recorded(out, source)


@pytest.fixture
def own(whole: Recorded, tmp_path: Path) -> Recorded:
    """A copy of one's own."""
    shutil.copytree(whole.folder, tmp_path / whole.folder.name)
    return Recorded(tmp_path / whole.folder.name, whole.source)
