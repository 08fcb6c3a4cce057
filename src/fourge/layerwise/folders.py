"""Folders of a run: locked, cleaned, compared, with room on the disk.

A record is a small JSON file; where it is missing or not whole, there is none.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from fourge.checkpoint.writer import PARTIAL_SUFFIX, writing
from fourge.errors import BudgetError, OutputError
from fourge.layerwise.budget import format_bytes

# Where fourge keeps what it knows of a checkpoint, within it.
OWN_FOLDER = "fourge"


def differences(mine: object, theirs: object, path: str = "") -> list[str]:
    """``path: theirs -> mine`` for every leaf that differs."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        keys = dict.fromkeys([*theirs, *mine])
        return [
            line
            for key in keys
            for line in differences(
                mine.get(key), theirs.get(key), f"{path} / {key}" if path else str(key)
            )
        ]
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        pairs = enumerate(zip(mine, theirs, strict=True))
        return [line for number, (a, b) in pairs for line in differences(a, b, f"{path}[{number}]")]
    return [] if mine == theirs else [f"{path}: {_short(theirs)} -> {_short(mine)}"]


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def refuse_within(what: str, inner: Path, what_outer: str, outer: Path) -> None:
    """OutputError if ``inner`` lies in ``outer`` or is the same folder."""
    if inner.resolve() == outer.resolve() or outer.resolve() in inner.resolve().parents:
        raise OutputError(
            f"the {what} {inner} overlaps the {what_outer} {outer}: choose another place for it."
        )


def read_record(path: Path) -> dict | None:
    """The JSON object in ``path``, or None where there is none."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


@contextmanager
def own_folders(*folders: Path) -> Iterator[None]:
    """Make folders, and take away again those that are still empty at the end."""
    made = [one for folder in folders for one in (*reversed(folder.parents), folder)]
    made = [folder for folder in dict.fromkeys(made) if not folder.exists()]
    try:
        for folder in folders:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process alone; the lock dies with the process."""
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


def remove_partial(files: Iterable[Path]) -> None:
    """Delete what an interrupted run had not finished writing of these files."""
    for path in list(files):
        path.with_name(path.name + PARTIAL_SUFFIX).unlink(missing_ok=True)


def check_space(needs: Iterable[tuple[Path, int]]) -> None:
    """Compare the bytes still to be written into folders with what their disks have free."""
    per_disk: dict[int, tuple[Path, int]] = {}
    for folder, nbytes in needs:
        disk = folder.stat().st_dev
        first, total = per_disk.get(disk, (folder, 0))
        per_disk[disk] = (first, total + nbytes)
    for folder, nbytes in per_disk.values():
        free = shutil.disk_usage(folder).free
        if nbytes > free:
            raise BudgetError(
                f"the disk of {folder} has {format_bytes(free)} free; this run needs"
                f" {format_bytes(nbytes, up=True)} more (output and activations): free space, or"
                " put the activations elsewhere with --work."
            )
