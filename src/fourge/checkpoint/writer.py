"""Shards whose every byte is planned before the first is written.

A shard is written under a temporary name (``.partial``), its tensors in any order and from any
thread, then synced and renamed: a file with a final name is whole. The layout follows the
safetensors library: tensors by falling alignment, then by name, header padded to 8 bytes.
Knows bytes, not tensors; imports no torch.
"""

import errno
import json
import math
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fourge.checkpoint.header import DTYPE_BYTES, INDEX_NAME
from fourge.errors import OutputError

PARTIAL_SUFFIX = ".partial"


class OutTensor(NamedTuple):
    """A tensor to be written: name, safetensors dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class ShardPlan:
    """One file to be: its header bytes and where each tensor begins in the file."""

    file: str
    header: bytes
    starts: dict[str, int]
    sizes: dict[str, int]
    nbytes: int


def plan_shard(file: str, tensors: Iterable[OutTensor]) -> ShardPlan:
    """Lay the tensors out as the safetensors library would."""
    ordered = sorted(tensors, key=lambda tensor: (-DTYPE_BYTES[tensor.dtype], tensor.name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        end = offset + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    starts, sizes = {}, {}
    position = len(header)
    for tensor in ordered:
        starts[tensor.name], sizes[tensor.name] = position, tensor.nbytes
        position += tensor.nbytes
    return ShardPlan(file, header, starts, sizes, position)


def is_written(folder: Path, plan: ShardPlan) -> bool:
    """Whether the shard has its final name, its size and its header."""
    path = folder / plan.file
    if not path.is_file() or path.stat().st_size != plan.nbytes:
        return False
    with path.open("rb") as stream:
        return stream.read(len(plan.header)) == plan.header


class ShardWriter:
    """Writes one planned shard; ``commit`` gives it its final name when it is complete."""

    def __init__(self, folder: Path, plan: ShardPlan) -> None:
        self._plan = plan
        self._final = folder / plan.file
        self._partial = folder / (plan.file + PARTIAL_SUFFIX)
        self._missing = dict(plan.sizes)
        self._lock = threading.Lock()
        with writing(self._partial):
            self._descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                write_all(self._descriptor, plan.header, 0)
            except BaseException:
                self.close()
                raise

    def write(self, name: str, data: memoryview, offset: int = 0) -> None:
        """Write bytes into tensor ``name``, ``offset`` from its begin; each byte once."""
        assert offset + len(data) <= self._plan.sizes[name], f"{name} is larger than planned"
        with writing(self._partial):
            write_all(self._descriptor, data, self._plan.starts[name] + offset)
        with self._lock:
            self._missing[name] -= len(data)

    def commit(self) -> None:
        """Sync, rename, sync the folder."""
        lacking = [name for name, left in self._missing.items() if left]
        assert not lacking, f"shard {self._plan.file} lacks bytes of {lacking[:3]}"
        with writing(self._final):
            os.fsync(self._descriptor)
            os.rename(self._partial, self._final)
            sync_folder(self._final.parent)

    def close(self) -> None:
        """Close the file; what was not committed is removed."""
        os.close(self._descriptor)
        self._partial.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A stream whose bytes become the file ``path`` at the end: whole whenever it has its name."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    with writing(path):
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(partial, path)
        sync_folder(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file through ``replacing``."""
    with replacing(path) as stream:
        stream.write(data)


def write_json(path: Path, value: object) -> None:
    """``write_file`` of indented JSON."""
    write_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_index(folder: Path, plans: Iterable[ShardPlan]) -> None:
    """The index over the shards, in the form that transformers writes."""
    plans = list(plans)
    weight_map = {name: plan.file for plan in plans for name in plan.sizes}
    total = sum(sum(plan.sizes.values()) for plan in plans)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX_NAME, index)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"the disk is full while writing {path}: free space and run the same command again;"
                " finished layers are kept."
            ) from error
        raise OutputError(f"cannot write {path}: {error.strerror}.") from error


def write_all(descriptor: int, data: bytes | memoryview, position: int) -> None:
    """Write all of ``data`` at ``position`` of an open file, however many calls it takes."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written
