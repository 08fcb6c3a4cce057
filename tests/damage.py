"""Quantized checkpoints to damage, and what the doctor's rules on numbers say of them."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from fourge.doctor.evidence import Evidence, gather
from fourge.doctor.experts import Depth, Numbers, check_numbers
from fourge.doctor.files import open_files
from fourge.errors import ConfigError
from fourge.models.config import from_dict
from fourge_process import run
from random_checkpoint import write_input_ids
from tensor_edits import INDEX


class Case(NamedTuple):
    """A source and its quantized checkpoint."""

    source: Path
    checkpoint: Path

    @classmethod
    def of(cls, source: Path, folder: Path, vocab: int) -> "Case":
        """Quantize ``source`` into ``folder``."""
        data = write_input_ids(folder / "data.jsonl", sequences=8, length=64, vocab=vocab)
        done = run("quantize", source, folder / "made", "--method", "max", "--data", data)
        assert done.status == 0, done.stderr
        return cls(source, folder / "made")

    def copy(self, folder: Path) -> "Case":
        """The same with a checkpoint of one's own."""
        shutil.copytree(self.checkpoint, folder / "own")
        return Case(self.source, folder / "own")

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor into the last shard and the index."""
        index = json.loads((self.checkpoint / INDEX).read_text())
        file = max(index["weight_map"].values())
        save_file(
            load_file(self.checkpoint / file) | {name: tensor},
            self.checkpoint / file,
            metadata={"format": "pt"},
        )
        index["weight_map"][name] = file
        (self.checkpoint / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def remove(self, name: str) -> None:
        """Take a tensor out of its shard and the index."""
        index = json.loads((self.checkpoint / INDEX).read_text())
        path = self.checkpoint / index["weight_map"].pop(name)
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors, path, metadata={"format": "pt"})
        (self.checkpoint / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def examined(
    checkpoint: Path, source: Path | None = None, depth: Depth | None = None
) -> tuple[Evidence, Numbers]:
    """The rules on numbers alone, with a config that is taken as it is."""
    evidence = gather(open_files(checkpoint))
    evidence.source = gather(open_files(source)) if source else None
    with suppress(ConfigError):
        evidence.config = from_dict(evidence.raw)
    return evidence, check_numbers(evidence, depth or Depth(), lambda *_: None)


def numbers_of(checkpoint: Path, source: Path | None = None, depth: Depth | None = None) -> Numbers:
    """What they found."""
    return examined(checkpoint, source, depth)[1]


def rules_of(checkpoint: Path, source: Path | None = None) -> list[str]:
    """Ids of those that fire."""
    return [one.rule for one in numbers_of(checkpoint, source).findings]
