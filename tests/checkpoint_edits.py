"""Accidents of a checkpoint's files, for tests of the doctor: each changes one folder in place."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fourge.doctor.examine import Report, examine, look_at
from fourge.doctor.experts import Depth
from tensor_edits import INDEX

CONFIG, HF_QUANT = "config.json", "hf_quant_config.json"


def report_of(checkpoint: Path | str, source: Path | None = None) -> Report:
    """All rules, as ``fourge doctor`` applies them."""
    return examine(look_at(checkpoint, source), Depth(), lambda *_: None)


def rules_of(checkpoint: Path | str, source: Path | None = None) -> list[str]:
    """Ids of the findings."""
    return [finding.rule for finding in report_of(checkpoint, source).findings]


class Folder:
    """A checkpoint of one's own to damage."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # -- JSON

    def read(self, name: str) -> Any:
        return json.loads((self.path / name).read_text())

    def write(self, name: str, value: Any) -> None:
        (self.path / name).write_text(json.dumps(value, indent=2) + "\n")

    def config(self, **changes: Any) -> None:
        """Set keys of config.json; None takes one away."""
        raw = self.read(CONFIG) | changes
        self.write(CONFIG, {key: value for key, value in raw.items() if value is not None})

    def flat(self, **changes: Any) -> None:
        """Set keys of config.json's quantization_config; None takes one away."""
        block = self.read(CONFIG)["quantization_config"] | changes
        self.config(quantization_config={k: v for k, v in block.items() if v is not None})

    def nested(self, **changes: Any) -> None:
        """Set keys of hf_quant_config.json's quantization."""
        document = self.read(HF_QUANT)
        document["quantization"] |= changes
        self.write(HF_QUANT, document)

    def exclude(self, change: Callable[[list[str]], Iterable[str]]) -> None:
        """Change the exclude list, in both files."""
        entries = list(change(list(self.read(CONFIG)["quantization_config"]["ignore"])))
        self.flat(ignore=entries)
        self.nested(exclude_modules=entries)

    # -- tensors

    @property
    def weight_map(self) -> dict[str, str]:
        return self.read(INDEX)["weight_map"]

    def names(self, part: str) -> list[str]:
        """The tensor of that name, or else the names of the index that have ``part`` in them."""
        return [part] if part in self.weight_map else [n for n in self.weight_map if part in n]

    def load(self, name: str) -> torch.Tensor:
        return load_file(self.path / self.weight_map[name])[name]

    def change(self, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
        """Edit the tensors of every shard that ``edit`` gives back otherwise; the index follows."""
        places = {}
        for file in sorted(set(self.weight_map.values())):
            before = load_file(self.path / file)
            after = edit(dict(before))
            places |= dict.fromkeys(after, file)
            if after.keys() != before.keys() or any(after[k] is not before[k] for k in after):
                tensors = {name: tensor.contiguous() for name, tensor in after.items()}
                save_file(tensors, self.path / file, metadata={"format": "pt"})
        self.index(lambda _: places)

    def index(self, edit: Callable[[dict[str, str]], dict[str, str]]) -> None:
        """Change the weight_map."""
        document = self.read(INDEX)
        document["weight_map"] = edit(dict(document["weight_map"]))
        self.write(INDEX, document)

    def drop(self, *parts: str) -> None:
        """Take away all tensors with one of ``parts`` in their names; fails where there is none."""
        assert all(self.names(part) for part in parts), parts
        self.change(
            lambda own: {
                name: tensor
                for name, tensor in own.items()
                if not any(part in name for part in parts)
            }
        )

    def put(self, tensors: dict[str, torch.Tensor]) -> None:
        """Add or replace tensors: those that are new go into the last shard."""
        file = max(self.weight_map.values())
        places = {name: self.weight_map.get(name, file) for name in tensors}
        for file in sorted(set(places.values())):
            own = {name: tensor for name, tensor in tensors.items() if places[name] == file}
            merged = load_file(self.path / file) | own
            save_file(
                {name: tensor.contiguous() for name, tensor in merged.items()},
                self.path / file,
                metadata={"format": "pt"},
            )
        self.index(lambda old: old | places)

    def map(self, part: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace all tensors with ``part`` in their names."""
        names = self.names(part)
        assert names, part
        self.put({name: edit(self.load(name)) for name in names})

    def rename(self, edit: Callable[[str], str]) -> None:
        self.change(lambda own: {edit(name): tensor for name, tensor in own.items()})

    def pack(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a weight as NVFP4, bytes without a meaning."""
        rows, columns = self.load(name).shape
        return {
            name: torch.zeros(rows, columns // 2, dtype=torch.uint8),
            f"{name}_scale": torch.full((rows, columns // 16), 0x38, dtype=torch.uint8).view(
                torch.float8_e4m3fn
            ),
            f"{name}_scale_2": torch.tensor(1e-4),
            name.removesuffix("weight") + "input_scale": torch.tensor(1e-3),
        }

    def shard_of(self, part: str) -> str:
        return self.weight_map[self.names(part)[0]]

    def copy_shard(self, file: str, target: str) -> None:
        shutil.copy(self.path / file, self.path / target)


def expert(layer: int, number: int, rest: str = "") -> str:
    return f"model.layers.{layer}.mlp.experts.{number}.{rest}"
