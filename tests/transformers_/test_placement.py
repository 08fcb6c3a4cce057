"""Where weights lie: accelerate moves experts one by one, and reads them from the checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.offload import OffloadedWeightsLoader

Load = Callable[..., Any]
Tokens = Callable[..., torch.Tensor]
LENGTH = 40
# A device map of which the sparse layers, 1 and 2, wait on disk.
ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits[0]


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_gives_the_same_model(
    device_map: Any, checkpoint: Path, load: Load, tokens: Tokens
):
    ids = tokens(LENGTH)
    placed = load(checkpoint, device_map=device_map).to("cpu")
    assert torch.equal(logits(placed, ids), logits(load(checkpoint), ids))


def test_experts_on_disk_are_read_from_the_checkpoint_as_they_are_used(
    checkpoint: Path, load: Load, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ids = tokens(LENGTH)
    model = load(checkpoint, device_map=ON_DISK, offload_folder=str(tmp_path))
    experts = model.model.layers[1].mlp.experts
    assert {tensor.device.type for tensor in experts.parameters()} == {"meta"}
    assert torch.equal(logits(model, ids), logits(load(checkpoint), ids))
    assert {tensor.device.type for tensor in experts.parameters()} == {"meta"}
    assert list(tmp_path.iterdir()) == []

    read: list[str] = []
    original = OffloadedWeightsLoader.__getitem__

    def watched(self: Any, key: str) -> torch.Tensor:
        read.append(key)
        return original(self, key)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", watched)
    logits(model, tokens(1))
    packed = [name for name in read if ".mlp.experts." in name]
    assert len(packed) == len(set(packed)) == 2 * 2 * 3 * 3  # layers, experts, projections, parts
