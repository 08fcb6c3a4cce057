"""Change tensors of a written checkpoint, index included; for tests that need a damaged one."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"


def edit_tensors(
    folder: Path, ending: str, change: Callable[[torch.Tensor], torch.Tensor | None]
) -> int:
    """Replace every tensor whose name ends so by ``change`` of it; None takes it away. Returns how
    many there were.
    """
    path = folder / INDEX
    index = json.loads(path.read_text())
    places = index["weight_map"]
    chosen = {name: file for name, file in places.items() if name.endswith(ending)}
    for file in sorted(set(chosen.values())):
        tensors = load_file(folder / file)
        for name in [name for name in chosen if chosen[name] == file]:
            changed = change(tensors.pop(name))
            if changed is None:
                del places[name]
            else:
                tensors[name] = changed.contiguous()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    path.write_text(json.dumps(index, indent=2) + "\n")
    return len(chosen)
