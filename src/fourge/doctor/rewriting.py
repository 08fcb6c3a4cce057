"""Writes a checkpoint whose every tensor comes from somewhere known: bytes on disk, or made anew.

Each file gets its name when it is whole, config.json last. A shard whose tensors all stay is copied
as it is; others are laid out anew. What an interrupted call has finished is kept by the next, as
long as ``fourge/repairing.json`` says that it wrote the same. Knows no rule. Peak memory: a piece
of a file, and what is made anew, one tensor at a time.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from fourge.checkpoint.header import TensorInfo
from fourge.checkpoint.metadata import CONFIG_NAME
from fourge.checkpoint.source import tensor_bytes
from fourge.checkpoint.writer import (
    OutTensor,
    ShardPlan,
    ShardWriter,
    is_written,
    plan_shard,
    replacing,
    write_file,
    write_json,
    writing,
)
from fourge.doctor.files import LocalFiles
from fourge.doctor.passes import Progress
from fourge.errors import BudgetError, CheckpointError, OutputError

PIECE_BYTES = 16 << 20
OWN_FOLDER = "fourge"
MARKER, RECORD = f"{OWN_FOLDER}/repairing.json", f"{OWN_FOLDER}/repair.json"


class Copy(NamedTuple):
    """Bytes as they lie in a file."""

    files: LocalFiles
    info: TensorInfo


class Made(NamedTuple):
    """A tensor that is computed when it is written; ``how`` tells it from others."""

    how: str
    make: Callable[[], torch.Tensor]


class Output(NamedTuple):
    """One tensor of the checkpoint to be."""

    tensor: OutTensor
    content: Copy | Made


@dataclass
class Rewriting:
    """A whole checkpoint to be: tensors by shard, small files by name, files to copy."""

    shards: dict[str, list[Output]] = field(default_factory=dict)
    whole: dict[str, LocalFiles] = field(default_factory=dict)  # shards that stay as they are
    texts: dict[str, bytes] = field(default_factory=dict)
    copies: dict[str, LocalFiles] = field(default_factory=dict)


def write_checkpoint(out: Path, rewriting: Rewriting, record: dict, on_progress: Progress) -> None:
    """Write everything into ``out``, then ``record`` to fourge/repair.json.

    OutputError: out holds something else, or cannot be written; BudgetError: the disk is too small.
    """
    identity = {"input": _digest(rewriting)}
    check_target(out, identity)
    with writing(out):
        (out / OWN_FOLDER).mkdir(parents=True, exist_ok=True)
    plans = {
        file: plan_shard(file, [one.tensor for one in outputs])
        for file, outputs in rewriting.shards.items()
        if file not in rewriting.whole
    }
    with _locked(out):
        _check_space(out, rewriting, plans)
        write_json(out / MARKER, identity)
        _write_shards(out, rewriting, plans, on_progress)
        names = [*rewriting.copies, *rewriting.texts]
        for name in sorted(names, key=lambda name: name == CONFIG_NAME):
            if name in rewriting.texts:
                write_file(out / name, rewriting.texts[name])
            else:
                _copy_file(rewriting.copies[name].folder / name, out / name)
        write_json(out / RECORD, record)
        (out / MARKER).unlink()


def check_target(out: Path, identity: dict | None = None) -> None:
    """Refuse a folder that is not empty, unless an interrupted repair of the same input left it."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; needed is a folder, new or empty.")
    present = [path for path in out.rglob("*") if path.is_file()] if out.is_dir() else []
    if not [path for path in present if path != out / f"{MARKER}.partial"]:
        return
    try:
        marker = json.loads((out / MARKER).read_bytes())
    except (OSError, ValueError):
        raise OutputError(
            f"{out} is not empty; a repair writes a whole new checkpoint: choose a new folder."
        ) from None
    if identity is not None and marker != identity:
        raise OutputError(
            f"{out} holds an interrupted repair of another input, or with other findings: remove"
            " it, or choose a new folder."
        )


def _write_shards(
    out: Path, rewriting: Rewriting, plans: Mapping[str, ShardPlan], on_progress: Progress
) -> None:
    total = sum(one.tensor.nbytes for outputs in rewriting.shards.values() for one in outputs)
    done = 0
    for file, outputs in sorted(rewriting.shards.items()):
        nbytes = sum(one.tensor.nbytes for one in outputs)
        if file in rewriting.whole:
            _copy_file(rewriting.whole[file].folder / file, out / file)
        elif not is_written(out, plans[file]):
            _write_shard(out, plans[file], outputs)
        done += nbytes
        on_progress("writing", done, total)


def _write_shard(out: Path, plan: ShardPlan, outputs: list[Output]) -> None:
    """In the order of the file, so that what is made together is written together."""
    writer = ShardWriter(out, plan)
    try:
        for one in sorted(outputs, key=lambda one: plan.starts[one.tensor.name]):
            offset = 0
            for piece in _pieces(one.content):
                writer.write(one.tensor.name, piece, offset)
                offset += len(piece)
        writer.commit()
    finally:
        writer.close()


def _pieces(content: Copy | Made) -> Iterator[memoryview]:
    if isinstance(content, Made):
        yield tensor_bytes(content.make().contiguous())
        return
    files, info = content
    for begin in range(0, info.nbytes, PIECE_BYTES):
        count = min(PIECE_BYTES, info.nbytes - begin)
        data = files.read(info.file, info.start + begin, count)
        if len(data) != count:
            raise CheckpointError(
                f"{files.folder / info.file} ends within {info.name}: it changed while it was"
                " read; run the same command again."
            )
        yield memoryview(data)


def _copy_file(source: Path, target: Path) -> None:
    """Copy unless it is there with its size: it has its name only if it is whole."""
    if target.is_file() and target.stat().st_size == source.stat().st_size:
        return
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as original, replacing(target) as copy:
        shutil.copyfileobj(original, copy, PIECE_BYTES)


def _check_space(out: Path, rewriting: Rewriting, plans: Mapping[str, ShardPlan]) -> None:
    sizes = {file: plan.nbytes for file, plan in plans.items()}
    sizes |= {file: files.sizes[file] for file, files in rewriting.whole.items()}
    sizes |= {name: files.sizes[name] for name, files in rewriting.copies.items()}
    sizes |= {name: len(data) for name, data in rewriting.texts.items()}
    left = sum(size for file, size in sizes.items() if not (out / file).is_file())
    free = shutil.disk_usage(out).free
    if left > free:
        raise BudgetError(
            f"the disk of {out} has {free / 1e9:.1f} GB free; the repaired checkpoint needs"
            f" {left / 1e9:.1f} GB more: free space, or choose a folder on another disk."
        )


def _digest(rewriting: Rewriting) -> str:
    """A hash of everything that the output depends on."""
    digest = hashlib.sha256()

    def add(*values: object) -> None:
        digest.update(json.dumps(values).encode())

    for file, outputs in sorted(rewriting.shards.items()):
        add(file, file in rewriting.whole)
        for one in outputs:
            add(*one.tensor[:2], list(one.tensor.shape))
            if isinstance(one.content, Made):
                add(one.content.how)
            else:
                add(one.content.files.place, *one.content.info[3:])
    places = {files.folder / name for name, files in rewriting.copies.items()}
    places |= {
        one.content.files.folder / one.content.info.file
        for outputs in rewriting.shards.values()
        for one in outputs
        if isinstance(one.content, Copy)
    }
    for path in sorted(places):
        add(str(path), path.stat().st_size, path.stat().st_mtime_ns)
    for name, data in sorted(rewriting.texts.items()):
        digest.update(name.encode() + b"\0" + data)
    return digest.hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(
                f"another fourge process is working in {folder}: wait for it, or stop it."
            ) from None
        yield
    finally:
        os.close(descriptor)
