"""The receipt of an evaluation: everything that a figure depends on, by hash.

Two receipts are comparable when their ``comparable`` is equal: the same reference weights, tokens,
windows, arithmetic and lanes' definition. Then their windows may be paired, run by run.
"""

import hashlib
import json
import platform
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from fourge import __version__
from fourge.calibrate.corpus import Corpus
from fourge.checkpoint.metadata import CONFIG_NAME
from fourge.checkpoint.writer import write_json
from fourge.errors import CheckpointError
from fourge.layerwise.folders import read_record
from fourge.models.survey import Source

BLOCK_BYTES = 1 << 20
# What of a receipt decides whether another one may be compared with it, and how it is told.
COMPARABLE = {
    "method": "the version of the method",
    "reference": "the reference's files",
    "data": "the tokens",
    "context": "the context",
    "arithmetic": "the arithmetic",
    "input_scale": "how input_scale is reduced",
}
# Raised when the definition of a figure changes, so that old receipts are no longer compared.
METHOD = 1


class FileHashes:
    """sha256 of every weight file and config.json of some checkpoints, computed in a thread of its
    own while the layers run, and kept in ``path`` so that a resumed run does not repeat it.
    """

    def __init__(self, sources: Sequence[Source], path: Path) -> None:
        self._path = path
        self._known: dict[str, dict] = read_record(path) or {}
        self._files = {source.folder: sorted([*source.shards, CONFIG_NAME]) for source in sources}
        self._stop = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="hash", daemon=True)

    def __enter__(self) -> "FileHashes":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def of(self, source: Source) -> dict[str, str]:
        """File -> sha256; waits until all are known. CheckpointError if a file cannot be read."""
        self._thread.join()
        if self._error is not None:
            raise CheckpointError(
                f"cannot read {self._error.filename} to hash it: {self._error.strerror}."
            )
        return {
            file: self._known[str(source.folder / file)]["sha256"]
            for file in self._files[source.folder]
        }

    def _run(self) -> None:
        try:
            for folder, files in self._files.items():
                for file in files:
                    self._hash(folder / file)
                    if self._stop.is_set():
                        return
        except OSError as error:
            self._error = error

    def _hash(self, path: Path) -> None:
        status = path.stat()
        state = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        known = self._known.get(str(path))
        if known is not None and {key: known[key] for key in state} == state:
            return
        digest, block = hashlib.sha256(), bytearray(BLOCK_BYTES)
        with path.open("rb", buffering=0) as stream:
            while (count := stream.readinto(block)) and not self._stop.is_set():
                digest.update(memoryview(block)[:count])
        if not self._stop.is_set():
            self._known[str(path)] = state | {"sha256": digest.hexdigest()}
            write_json(self._path, self._known)


def describe_data(corpus: Corpus) -> dict:
    """Tokens by hash and count, kind by kind."""
    return {
        "sha256": corpus.record["sha256"],
        "tokens": corpus.record["tokens"],
        "windows": corpus.record["sequences"],
        "kinds": [
            {
                "name": one["name"],
                "windows": one["sequences"],
                "tokens": one["tokens"],
                "sources": one["sources"],
            }
            for one in corpus.record["passes"]
        ],
        "warnings": corpus.record["warnings"],
    }


def comparable_key(receipt: Mapping) -> str:
    """sha256 over what two receipts must have in common."""
    common = {"method": receipt["method"]} | {
        key: _identity(key, receipt[key]) for key in COMPARABLE if key != "method"
    }
    return hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()


def differences(ours: Mapping, theirs: Mapping) -> list[str]:
    """What keeps two receipts from being compared, in words; empty if nothing does."""
    return [
        words
        for key, words in COMPARABLE.items()
        if _identity(key, ours.get(key)) != _identity(key, theirs.get(key))
    ]


def _identity(key: str, value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    return {"reference": value.get("files"), "data": value.get("sha256")}.get(key, dict(value))


def versions() -> dict[str, str]:
    """What computed."""
    return {
        "fourge": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def calibration_overlap(candidate: Path, data: Mapping) -> list[str]:
    """Names of evaluated files that were calibration data of this checkpoint, by hash."""
    run = read_record(candidate / "fourge" / "run.json") or {}
    used = {
        source.get("sha256")
        for one in run.get("data", {}).get("passes", [])
        for source in one.get("sources", [])
    }
    sources = [source for kind in data["kinds"] for source in kind["sources"]]
    return sorted({one["name"] for one in sources if one.get("sha256") in used - {None}})
