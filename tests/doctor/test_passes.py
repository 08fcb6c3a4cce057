"""Passes over many tensors: order, bounds, errors."""

import threading
import time
from pathlib import Path

import pytest

from fourge.checkpoint.header import TensorInfo
from fourge.doctor.files import LocalFiles
from fourge.doctor.passes import in_parallel, load, load_bytes, num_workers
from fourge.errors import CheckpointError


def test_results_come_in_order_and_few_items_are_under_way():
    lock, running, most = threading.Lock(), 0, 0

    def work(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002 * (number % 3))
        with lock:
            running -= 1
        return number * number

    assert list(in_parallel(work, range(40), 3)) == [number * number for number in range(40)]
    assert most == 3


def test_an_error_ends_the_pass_and_nothing_is_begun_after_it():
    begun = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 2:
            raise CheckpointError("unreadable")
        return number

    with pytest.raises(CheckpointError, match="unreadable"):
        list(in_parallel(work, range(1000), 2))
    assert len(begun) < 10


def test_memory_decides_on_the_number_of_threads():
    assert num_workers(100, 10) == 1
    assert num_workers(100, 250) <= 2
    assert 1 <= num_workers(100, None) <= 16


def test_tensors_are_read_whole_or_in_part(tmp_path: Path):
    (tmp_path / "a").write_bytes(bytes(range(32)))
    files = LocalFiles(tmp_path)
    info = TensorInfo("x", "F32", (2, 2), "a", 4, 16)
    assert load(files, info).shape == (2, 2)
    assert load_bytes(files, info, 2, 3).tolist() == [6, 7, 8]
    assert load_bytes(files, info, 16).tolist() == []
    with pytest.raises(CheckpointError, match="ends within x"):
        load(files, TensorInfo("x", "F32", (8,), "a", 4, 32))
