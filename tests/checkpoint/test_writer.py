"""Planned shards equal the safetensors library's, and appear whole or not at all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourge.checkpoint.header import INDEX_NAME
from fourge.checkpoint.source import tensor_bytes
from fourge.checkpoint.writer import (
    OutTensor,
    ShardWriter,
    is_written,
    plan_shard,
    write_file,
    write_index,
    writing,
)
from fourge.errors import OutputError

TENSORS = {
    "z.weight": torch.arange(32, dtype=torch.uint8).reshape(2, 16),
    "a.bias": torch.arange(3, dtype=torch.float32),
    "m.scale": torch.tensor(0.5),
    "k.weight": torch.arange(8, dtype=torch.bfloat16).reshape(4, 2),
}
DTYPES = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16"}


def planned(file: str = "x.safetensors"):
    return plan_shard(
        file, [OutTensor(name, DTYPES[t.dtype], tuple(t.shape)) for name, t in TENSORS.items()]
    )


def test_a_shard_is_byte_identical_to_the_library_s(tmp_path: Path):
    plan = planned()
    writer = ShardWriter(tmp_path, plan)
    for name in reversed(TENSORS):
        writer.write(name, tensor_bytes(TENSORS[name]))
    writer.commit()
    writer.close()
    save_file(TENSORS, tmp_path / "library.safetensors", metadata={"format": "pt"})
    written = (tmp_path / "x.safetensors").read_bytes()
    assert written == (tmp_path / "library.safetensors").read_bytes()
    assert len(written) == plan.nbytes
    assert is_written(tmp_path, plan)


def test_a_tensor_may_come_in_parts(tmp_path: Path):
    writer = ShardWriter(tmp_path, planned())
    for name, tensor in TENSORS.items():
        data = tensor_bytes(tensor)
        writer.write(name, data[3:], 3)
        writer.write(name, data[:3])
    writer.commit()
    writer.close()
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_an_unfinished_shard_has_no_final_name_and_is_removed(tmp_path: Path):
    writer = ShardWriter(tmp_path, planned())
    writer.write("a.bias", tensor_bytes(TENSORS["a.bias"]))
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors.partial"]
    with pytest.raises(AssertionError, match="lacks bytes of"):
        writer.commit()
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_another_plan_is_not_taken_for_written(tmp_path: Path):
    write_file(tmp_path / "x.safetensors", b"\0" * planned().nbytes)
    assert not is_written(tmp_path, planned())
    assert not is_written(tmp_path, planned("y.safetensors"))


def test_the_index_lists_every_tensor_and_the_total(tmp_path: Path):
    write_index(tmp_path, [planned("x.safetensors")])
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["weight_map"] == dict.fromkeys(sorted(TENSORS), "x.safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())


def test_a_full_disk_is_told_as_such(tmp_path: Path):
    with pytest.raises(OutputError, match="disk is full while writing"), writing(tmp_path):
        raise OSError(28, "No space left on device")


def test_an_unwritable_place_is_told_as_such(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*Not a directory"):
        ShardWriter(tmp_path / "file", planned())
