"""Headers are read as the safetensors library reads them, and every damage is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourge.checkpoint.header import INDEX_NAME, SINGLE_NAME, read_checkpoint, read_header
from fourge.errors import CheckpointError

TENSORS = {
    "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "b": torch.arange(4, dtype=torch.float32),
    "c": torch.tensor(7, dtype=torch.uint8),
}


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards and an index."""
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({"b": TENSORS["b"], "c": TENSORS["c"]}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    return tmp_path


def test_a_header_tells_where_the_bytes_lie(folder: Path):
    for info in read_checkpoint(folder).tensors.values():
        data = (folder / info.file).read_bytes()[info.start : info.start + info.nbytes]
        expected = load_file(folder / info.file)[info.name]
        assert data == bytes(expected.reshape(-1).view(torch.uint8).numpy())
        assert info.shape == tuple(expected.shape)


def test_a_single_file_needs_no_index(tmp_path: Path):
    save_file(TENSORS, tmp_path / SINGLE_NAME)
    assert read_checkpoint(tmp_path).tensors.keys() == TENSORS.keys()


def test_a_truncated_shard_is_named(folder: Path):
    path = folder / "two.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"two\.safetensors has \d+ bytes but its header"):
        read_checkpoint(folder)


def test_a_garbage_tail_is_named(folder: Path):
    path = folder / "two.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="garbage tail"):
        read_checkpoint(folder)


@pytest.mark.parametrize("data", [b"", b"1234567", b"\xff" * 16, (20).to_bytes(8, "little")])
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, data: bytes):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1]}},
        [1],
    ],
)
def test_a_malformed_header_is_named(tmp_path: Path, header: object):
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    with pytest.raises(CheckpointError, match="malformed safetensors header"):
        read_header(path)


def test_overlapping_tensors_are_named(tmp_path: Path):
    header = {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 6)
    with pytest.raises(CheckpointError, match="data of b overlaps"):
        read_header(path)


def test_a_missing_shard_is_named(folder: Path):
    (folder / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors is missing; 2 tensors"):
        read_checkpoint(folder)


def test_a_shard_outside_the_index_is_named(folder: Path):
    save_file({"d": TENSORS["a"]}, folder / "mtp.safetensors")
    with pytest.raises(CheckpointError, match=r"mtp\.safetensors, which the index does not name"):
        read_checkpoint(folder)


def test_a_tensor_in_two_shards_is_named(folder: Path):
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, folder / "one.safetensors")
    with pytest.raises(CheckpointError, match="b is in two shards"):
        read_checkpoint(folder)


def test_an_index_that_names_a_missing_tensor_is_refused(folder: Path):
    files = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    write_index(folder, files | {"d": "one.safetensors"})
    with pytest.raises(CheckpointError, match="places d in one"):
        read_checkpoint(folder)


def test_a_tensor_that_the_index_forgets_is_refused(folder: Path):
    write_index(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(CheckpointError, match="holds c, which"):
        read_checkpoint(folder)


def test_a_shard_name_cannot_leave_the_folder(folder: Path):
    write_index(folder, {"a": "../one.safetensors"})
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        read_checkpoint(folder)


def test_an_empty_folder_and_a_missing_one_are_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="holds neither"):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        read_checkpoint(tmp_path / "nowhere")
