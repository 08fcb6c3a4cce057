"""Tensors from a source checkpoint, streamed in groups, one group ahead, each byte read once.

Reads with ``preadv`` into arenas that are allocated once: file mappings would count towards the
resident memory that a run promises to bound, and fresh memory is slow to touch. While the caller
works on one group, a thread fills the other arena. On a GPU the arenas lie in device memory and
bytes pass through one pinned staging buffer.
Peak memory: two arenas of the largest group, plus the staging buffer on the host for a GPU.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from fourge.checkpoint.header import DTYPE_BYTES, TensorInfo, aligned_bytes
from fourge.errors import CheckpointError

TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}


class TensorStream:
    """Iterate over groups of tensors of one checkpoint.

    Each item is a dict of views into an arena, valid until the next item is asked for.
    """

    def __init__(
        self,
        folder: Path,
        groups: Sequence[Sequence[TensorInfo]],
        *,
        device: torch.device,
        staging_bytes: int,
    ) -> None:
        self._files = FileReader(folder)
        self._groups = groups
        self._device = device
        capacity = max((aligned_bytes(group) for group in groups), default=0)
        count = min(2, len(groups))
        self._arenas = [
            torch.empty(capacity, dtype=torch.uint8, device=device) for _ in range(count)
        ]
        self._staging = (
            torch.empty(min(staging_bytes, capacity), dtype=torch.uint8, pin_memory=True)
            if device.type == "cuda"
            else None
        )

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        with self._files, ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
            ahead: Future | None = pool.submit(self._load, 0) if self._groups else None
            for number in range(len(self._groups)):
                assert ahead is not None
                group = ahead.result()
                last = number + 1 == len(self._groups)
                # The caller has let go of the previous group, so its arena may be filled again.
                ahead = None if last else pool.submit(self._load, number + 1)
                yield group

    def _load(self, number: int) -> dict[str, torch.Tensor]:
        views = {}
        for info, target in _side_by_side(self._groups[number], self._arenas[number % 2]):
            self._fill(info, target)
            views[info.name] = _typed(info, target)
        return views

    def _fill(self, info: TensorInfo, target: torch.Tensor) -> None:
        if self._staging is None:
            self._files.read(info, target)
            return
        for begin in range(0, info.nbytes, len(self._staging)):
            piece = self._staging[: min(len(self._staging), info.nbytes - begin)]
            self._files.read(info, piece, begin)
            target[begin : begin + len(piece)].copy_(piece)  # synchronous: staging is reused next


class FileReader:
    """Open descriptors of a checkpoint's shards; reads byte ranges of tensors."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> "FileReader":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, info: TensorInfo, target: torch.Tensor, offset: int = 0) -> None:
        """Fill the uint8 CPU tensor ``target`` from ``offset`` bytes into the tensor."""
        try:
            descriptor = self._descriptors.get(info.file)
            if descriptor is None:
                descriptor = os.open(self._folder / info.file, os.O_RDONLY)
                self._descriptors[info.file] = descriptor
            if not read_all(descriptor, target, info.start + offset):
                raise CheckpointError(
                    f"{self._folder / info.file} ends within {info.name}: it was truncated"
                    " during the run; restore it and run the same command again."
                )
        except OSError as error:
            raise CheckpointError(
                f"cannot read {info.name} from {self._folder / info.file}: {error.strerror};"
                " finished layers are kept, run the same command again when it is readable."
            ) from error


def read_all(descriptor: int, target: torch.Tensor, position: int) -> bool:
    """Fill a CPU tensor from ``position`` of an open file; False if the file ends before."""
    view = tensor_bytes(target)
    while view:
        count = os.preadv(descriptor, [view], position)
        if count == 0:
            return False
        view, position = view[count:], position + count
    return True


def read_pieces(
    files: FileReader, info: TensorInfo, buffer: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first row, rows) of a tensor, as many rows at a time as the uint8 ``buffer`` holds.

    A row that is longer than the buffer is an error of ours: the caller sizes it.
    """
    row_elements = info.nbytes // info.shape[0] // DTYPE_BYTES[info.dtype] if info.shape else 1
    row_bytes = row_elements * DTYPE_BYTES[info.dtype]
    rows_at_once = len(buffer) // row_bytes
    assert rows_at_once, f"a row of {info.name} is longer than the buffer"
    num_rows = info.shape[0] if info.shape else 1
    for first in range(0, num_rows, rows_at_once):
        count = min(rows_at_once, num_rows - first)
        target = buffer[: count * row_bytes]
        files.read(info, target, first * row_bytes)
        yield first, target.view(TORCH_DTYPES[info.dtype]).view(count, row_elements)


def read_all_tensors(
    files: FileReader, tensors: Iterable[TensorInfo], buffer: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Small tensors by name on the CPU, each in memory of its own, or all of them in the uint8
    ``buffer``, which needs ``aligned_bytes`` of them.
    """
    if buffer is None:
        places = ((info, torch.empty(info.nbytes, dtype=torch.uint8)) for info in tensors)
    else:
        places = _side_by_side(tensors, buffer)
    result = {}
    for info, data in places:
        files.read(info, data)
        result[info.name] = _typed(info, data)
    return result


def _side_by_side(
    tensors: Iterable[TensorInfo], buffer: torch.Tensor
) -> Iterator[tuple[TensorInfo, torch.Tensor]]:
    """Each with its bytes of the uint8 ``buffer``, as ``aligned_bytes`` counts them."""
    start = 0
    for info in tensors:
        yield info, buffer[start : start + info.nbytes]
        start += aligned_bytes([info])


def _typed(info: TensorInfo, data: torch.Tensor) -> torch.Tensor:
    return data.view(TORCH_DTYPES[info.dtype]).view(info.shape)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise CheckpointError if a floating-point tensor holds NaN or infinity."""
    # min and max carry NaN along and need no mask as large as the tensor, as isfinite would.
    low, high = torch.aminmax(tensor)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise not_finite(name)


def not_finite(name: str) -> CheckpointError:
    """The error for a weight that is NaN or infinite."""
    return CheckpointError(
        f"tensor {name} holds NaN or infinite values: the checkpoint is damaged; download the shard"
        " again, or ask its publisher."
    )
