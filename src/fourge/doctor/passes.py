"""Passes over many tensors: read and judged by threads, a bounded number at a time, in order.

Needs torch, as everything here that looks at whole tensors. Peak memory: what the tensors of
``workers`` items take at once.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from fourge.checkpoint.header import TensorInfo
from fourge.checkpoint.source import TORCH_DTYPES
from fourge.doctor.files import Files
from fourge.errors import CheckpointError

Item = TypeVar("Item")
Result = TypeVar("Result")
# Stage, bytes done, bytes in all.
Progress = Callable[[str, int, int], None]
MOST_WORKERS = 16


def num_workers(item_bytes: int, memory: int | None) -> int:
    """Threads that ``memory`` bytes have room for, at most one per core."""
    cores = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    return cores if memory is None else max(1, min(cores, memory // max(1, item_bytes)))


def in_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[Result]:
    """The results, in the order of the items; no item is begun that nobody has room for."""
    with ThreadPoolExecutor(workers, thread_name_prefix="doctor") as pool:
        begun: deque[Future[Result]] = deque()
        try:
            for item in items:
                if len(begun) == workers:
                    yield begun.popleft().result()
                begun.append(pool.submit(function, item))
            while begun:
                yield begun.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def load(files: Files, info: TensorInfo) -> Tensor:
    """A whole tensor, on the CPU. CheckpointError if the file ends before it does."""
    return load_bytes(files, info).view(TORCH_DTYPES[info.dtype]).view(info.shape)


def load_bytes(files: Files, info: TensorInfo, begin: int = 0, count: int | None = None) -> Tensor:
    """Some of a tensor's bytes, uint8: ``count`` from ``begin`` on, or all that follow."""
    count = info.nbytes - begin if count is None else count
    if not count:
        return torch.empty(0, dtype=torch.uint8)
    data = bytearray(files.read(info.file, info.start + begin, count))
    if len(data) != count:
        raise CheckpointError(
            f"{files.place}: {info.file} ends within {info.name}: it changed while it was read;"
            " run the same command again."
        )
    return torch.frombuffer(data, dtype=torch.uint8)
