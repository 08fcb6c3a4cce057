"""Streaming gives the bytes of the files, reads each once, and keeps two groups at most."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fourge.checkpoint.header import TensorInfo, read_checkpoint
from fourge.checkpoint.source import FileReader, TensorStream, check_finite, read_pieces
from fourge.errors import CheckpointError

CPU = torch.device("cpu")


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randn(i + 1, 5).bfloat16() for i in range(6)}
    tensors["scalar"] = torch.tensor(3.0)
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors


def test_groups_arrive_in_order_with_the_right_bytes(tmp_path: Path, tensors: dict):
    infos = read_checkpoint(tmp_path).tensors
    groups = [[infos["t0"], infos["t5"]], [infos["scalar"]], [infos["t1"], infos["t2"]], []]
    seen = []
    stream = TensorStream(tmp_path, groups, device=CPU, staging_bytes=0)
    for group in stream:
        seen.append(list(group))
        for name, tensor in group.items():
            assert torch.equal(tensor, tensors[name])
    assert seen == [["t0", "t5"], ["scalar"], ["t1", "t2"], []]


def test_every_byte_is_read_once(tmp_path: Path, tensors: dict, monkeypatch: pytest.MonkeyPatch):
    infos = read_checkpoint(tmp_path).tensors
    ranges = []
    read = FileReader.read

    def counting(self: FileReader, info: TensorInfo, target: torch.Tensor, offset: int = 0):
        ranges.append((info.start + offset, info.start + offset + len(target)))
        read(self, info, target, offset)

    monkeypatch.setattr(FileReader, "read", counting)
    list(TensorStream(tmp_path, [[info] for info in infos.values()], device=CPU, staging_bytes=0))
    ranges.sort()
    assert sum(end - begin for begin, end in ranges) == sum(i.nbytes for i in infos.values())
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))


def test_the_next_group_is_read_while_one_is_used(tmp_path: Path, tensors: dict):
    infos = read_checkpoint(tmp_path).tensors
    groups = [[infos[f"t{i}"]] for i in range(6)]
    iterator = iter(TensorStream(tmp_path, groups, device=CPU, staging_bytes=0))
    first = next(iterator)
    second = next(iterator)
    # The first arena is filled with group 2 now; the second group must stay untouched by it.
    assert torch.equal(second["t1"], tensors["t1"])
    third = next(iterator)
    assert third["t2"].data_ptr() == first["t0"].data_ptr()
    iterator.close()


def test_a_file_that_shrinks_during_the_run_is_named(tmp_path: Path, tensors: dict):
    infos = read_checkpoint(tmp_path).tensors
    path = tmp_path / "model.safetensors"
    last = max(infos.values(), key=lambda info: info.start)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match=f"ends within {last.name}"):
        list(TensorStream(tmp_path, [[last]], device=CPU, staging_bytes=0))


def test_a_file_that_vanishes_is_named(tmp_path: Path, tensors: dict):
    infos = read_checkpoint(tmp_path).tensors
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read t0 from .*No such file"):
        list(TensorStream(tmp_path, [[infos["t0"]]], device=CPU, staging_bytes=0))


def test_pieces_of_rows_make_up_the_tensor(tmp_path: Path, tensors: dict):
    info = read_checkpoint(tmp_path).tensors["t5"]
    buffer = torch.empty(2 * 5 * 2 + 3, dtype=torch.uint8)  # two rows and a bit
    with FileReader(tmp_path) as files:
        pieces = [(first, rows.clone()) for first, rows in read_pieces(files, info, buffer)]
    assert [first for first, _ in pieces] == [0, 2, 4]
    assert torch.equal(torch.cat([rows for _, rows in pieces]), tensors["t5"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_finite_is_named(value: float, dtype: torch.dtype):
    tensor = torch.zeros(3, 7, dtype=dtype)
    check_finite("fine", tensor)
    tensor[2, 3] = value
    with pytest.raises(CheckpointError, match=r"tensor layer\.x holds NaN or infinite"):
        check_finite("layer.x", tensor)
