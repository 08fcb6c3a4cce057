"""The files of a checkpoint, here or in a Hugging Face repository: names, sizes, ranges of bytes.

Remote files go through huggingface_hub's file system, so its endpoint, token, proxy and retries
apply (HF_ENDPOINT, HF_TOKEN). Only ranges are fetched, never a whole shard.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from fourge.checkpoint.header import TensorInfo
from fourge.errors import CheckpointError

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# Neighbouring ranges are fetched together when the hole between them is smaller than this.
HOLE_BYTES = 256 << 10
MOST_BYTES = 32 << 20


class Files(Protocol):
    """Read access to a checkpoint's files."""

    place: str
    sizes: dict[str, int]  # relative name -> bytes
    is_local: bool

    def read(self, name: str, start: int, count: int) -> bytes:
        """``count`` bytes from ``start`` on; fewer where the file ends before."""
        ...


class LocalFiles:
    """A folder."""

    is_local = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.place = folder, str(folder)
        self.sizes = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.relative_to(folder).parts[0] not in (".git", ".cache")
        }
        self._descriptors: dict[str, int] = {}

    def read(self, name: str, start: int, count: int) -> bytes:
        descriptor = self._descriptors.get(name)
        if descriptor is None:
            descriptor = os.open(self.folder / name, os.O_RDONLY)
            self._descriptors[name] = descriptor
        return os.pread(descriptor, count, start)

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


class RemoteFiles:
    """A repository of a Hugging Face hub."""

    is_local = False

    def __init__(self, repository: str) -> None:
        from huggingface_hub import HfFileSystem

        self.place = repository
        self._system: Any = HfFileSystem()
        try:
            found = self._system.find(repository, detail=True)
        except Exception as error:  # of the network, of the hub, of a missing repository
            reason = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            raise CheckpointError(
                f"{repository} is no folder here, and as a Hugging Face repository it cannot be"
                f" listed ({reason}): check the name, the network and HF_TOKEN."
            ) from error
        self.sizes = {
            name.removeprefix(f"{repository}/"): int(entry["size"]) for name, entry in found.items()
        }

    def read(self, name: str, start: int, count: int) -> bytes:
        path = f"{self.place}/{name}"
        end = min(start + count, self.sizes[name])
        try:
            return self._system.cat_file(path, start=start, end=end) if end > start else b""
        except Exception as error:
            raise CheckpointError(
                f"{path} cannot be read ({str(error).strip().splitlines()[0]}): check the network,"
                " and run the same command again."
            ) from error


def open_files(checkpoint: str | Path) -> Files:
    """The folder of that name, or else the repository; CheckpointError if it is neither."""
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return LocalFiles(folder)
    if folder.exists() or not REPOSITORY.fullmatch(str(checkpoint)):
        raise CheckpointError(
            f"{checkpoint} is no folder; give the folder of a checkpoint, or a repository ORG/NAME."
        )
    return RemoteFiles(str(checkpoint))


def read_tensors(files: Files, tensors: Sequence[TensorInfo]) -> Iterator[tuple[TensorInfo, bytes]]:
    """The bytes of small tensors, neighbours fetched together; in the order of files and places."""
    run: list[TensorInfo] = []
    for info in sorted(tensors, key=lambda one: (one.file, one.start)):
        if run and not _joins(run, info):
            yield from _read_run(files, run)
            run = []
        run.append(info)
    if run:
        yield from _read_run(files, run)


def _joins(run: list[TensorInfo], info: TensorInfo) -> bool:
    last = run[-1]
    near = info.file == last.file and info.start - (last.start + last.nbytes) < HOLE_BYTES
    return near and info.start + info.nbytes - run[0].start < MOST_BYTES


def _read_run(files: Files, run: list[TensorInfo]) -> Iterator[tuple[TensorInfo, bytes]]:
    begin = run[0].start
    data = files.read(run[0].file, begin, run[-1].start + run[-1].nbytes - begin)
    for info in run:
        yield info, data[info.start - begin : info.start - begin + info.nbytes]
