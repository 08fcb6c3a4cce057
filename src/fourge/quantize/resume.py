"""What a run leaves on disk so that the next one goes on from it, and refuses to if it should.

The state is the files themselves: a shard with its final name is whole, and was renamed only after
the activations behind it were. ``fourge/fingerprint.json`` says which input they belong to.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fourge import __version__
from fourge.checkpoint.writer import PARTIAL_SUFFIX, write_json, writing
from fourge.errors import BudgetError, OutputError
from fourge.quantize.budget import format_bytes
from fourge.quantize.plan import Source, config_digest, file_digests, header_digest

OWN_FOLDER = "fourge"
RUN_NAME = "run.json"
FINGERPRINT_NAME = "fingerprint.json"


def fingerprint(source: Source, recipe: Mapping, data: Mapping, dtype: str) -> dict:
    """Everything that the output's bytes depend on.

    ``data`` identifies the files of each pass, ``dtype`` is that of the computation.
    """
    return {
        "fourge": __version__,
        "source config.json": config_digest(source),
        "source shards": header_digest(source),
        "other source files": file_digests(source),
        "recipe": recipe,
        "data": data,
        "compute dtype": dtype,
    }


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


def check_target(out: Path, source: Path) -> None:
    """Refuse a target that is the source, lies in it, or holds what fourge did not make."""
    resolved, original = out.resolve(), source.resolve()
    if resolved == original or original in resolved.parents or resolved in original.parents:
        raise OutputError(f"the output folder {out} overlaps the source {source}: choose another.")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; needed is a folder, new or empty.")
    if not out.exists():
        return
    foreign = sorted(path.name for path in out.iterdir() if path.name != OWN_FOLDER)
    if foreign and not (out / OWN_FOLDER).is_dir():
        raise OutputError(
            f"{out} is not empty ({foreign[0]}{', ...' if len(foreign) > 1 else ''}) and was not"
            " made by fourge: choose a new folder."
        )


def finished_run(out: Path) -> dict | None:
    """The record of the finished run in ``out``, or None."""
    try:
        record = json.loads((out / OWN_FOLDER / RUN_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("finished") else None


def check_fingerprint(out: Path, mine: dict) -> None:
    """Store the fingerprint of a new run; OutputError if an earlier one had other input."""
    path = out / OWN_FOLDER / FINGERPRINT_NAME
    finished = finished_run(out)
    if finished is not None:
        theirs = finished.get("fingerprint")
    elif path.exists():
        theirs = json.loads(path.read_bytes())
    else:
        write_json(path, mine)
        return
    changed = differences(mine, theirs)
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise OutputError(
            f"{out} belongs to a run with other input: {'; '.join(changed[:3])}{more}. Give the"
            " same input to go on, or another output folder to start anew."
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process alone; the lock dies with the process."""
    with writing(folder):
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


def remove_partial(*folders: Path) -> None:
    """Delete what an interrupted run had not finished writing."""
    for folder in folders:
        for path in folder.rglob(f"*{PARTIAL_SUFFIX}"):
            path.unlink()


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
