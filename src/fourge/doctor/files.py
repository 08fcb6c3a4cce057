"""The files of a checkpoint, here or in a Hugging Face repository: names, sizes, ranges of bytes.

Of a repository only ranges are fetched, never a whole shard; endpoint, token, proxies and retries
are huggingface_hub's (HF_ENDPOINT, HF_TOKEN). Knows nothing of what the files hold.
"""

import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from fourge.checkpoint.header import TensorInfo
from fourge.errors import CheckpointError

# ORG/NAME, ORG/NAME@REVISION, or the address of a repository's page.
REPOSITORY = re.compile(
    r"(?:(?P<endpoint>https?://[^/]+)/)?(?P<name>\w[\w.-]*/\w[\w.-]*?)"
    r"(?:(?:@|/tree/)(?P<revision>[\w./-]+?))?/?"
)
# Neighbouring ranges are fetched together when the hole between them is smaller than this.
HOLE_BYTES = 256 << 10
MOST_BYTES = 32 << 20
# Of every remote file the first bytes are fetched at once: small files, and most headers.
HEAD_BYTES = 512 << 10
TIMEOUT_S = 60.0


class Files(Protocol):
    """Read access to a checkpoint's files."""

    place: str
    sizes: dict[str, int]  # relative name -> bytes
    is_local: bool

    def read(self, name: str, start: int, count: int) -> bytes:
        """``count`` bytes from ``start`` on; fewer where the file ends before. From any thread."""
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
        self._lock = threading.Lock()

    def read(self, name: str, start: int, count: int) -> bytes:
        pieces = []
        # A single call gives 2 GiB at most.
        while piece := os.pread(self._descriptor(name), count, start):
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _descriptor(self, name: str) -> int:
        with self._lock:
            if name not in self._descriptors:
                self._descriptors[name] = os.open(self.folder / name, os.O_RDONLY)
            return self._descriptors[name]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)


class Repository(NamedTuple):
    """Where a repository lies; ``endpoint`` None: that of huggingface_hub."""

    name: str
    revision: str | None
    endpoint: str | None


class RemoteFiles:
    """A repository of a Hugging Face hub."""

    is_local = False

    def __init__(self, repository: Repository) -> None:
        self.place, self._repository = repository.name, repository
        self._heads: dict[str, bytes] = {}
        try:
            tree = HfApi(endpoint=repository.endpoint).list_repo_tree(
                repository.name, recursive=True, revision=repository.revision
            )
            self.sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
        except Exception as error:  # of the network, the hub, or a repository that is not there
            raise CheckpointError(
                f"{repository.name} is no folder here, and as a Hugging Face repository it cannot"
                f" be listed ({_reason(error)}): check the name, the network and HF_TOKEN."
            ) from error

    def read(self, name: str, start: int, count: int) -> bytes:
        end = min(start + count, self.sizes[name])
        if end > HEAD_BYTES:
            return self._fetch(name, start, end)
        if name not in self._heads:
            self._heads[name] = self._fetch(name, 0, min(HEAD_BYTES, self.sizes[name]))
        return self._heads[name][start:end]

    def _fetch(self, name: str, start: int, end: int) -> bytes:
        if start >= end:
            return b""
        repository = self._repository
        url = hf_hub_url(
            repository.name, name, revision=repository.revision, endpoint=repository.endpoint
        )
        headers = build_hf_headers() | {
            "range": f"bytes={start}-{end - 1}",
            "accept-encoding": "identity",
        }
        try:
            with http_stream_backoff("GET", url, headers=headers, timeout=TIMEOUT_S) as response:
                hf_raise_for_status(response)
                if response.status_code != 206 and (start, end) != (0, self.sizes[name]):
                    raise ValueError("the server does not give parts of files")
                return response.read()
        except Exception as error:  # of the network or the hub
            raise CheckpointError(
                f"{self.place}/{name} cannot be read ({_reason(error)}): check the network, and run"
                " the same command again."
            ) from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def open_files(checkpoint: str | Path) -> Files:
    """The folder of that name, or else the repository; CheckpointError if it is neither."""
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return LocalFiles(folder)
    match = REPOSITORY.fullmatch(str(checkpoint))
    if folder.exists() or match is None:
        raise CheckpointError(
            f"{checkpoint} is no folder; give the folder of a checkpoint, or a repository ORG/NAME."
        )
    return RemoteFiles(Repository(match["name"], match["revision"], match["endpoint"]))


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
