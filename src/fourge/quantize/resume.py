"""What a run leaves on disk so that the next one goes on from it, and refuses to if it should.

The state is the files themselves: a shard with its final name is whole, and was renamed only after
the activations behind it were. ``fourge/fingerprint.json`` says which input they belong to
and where its activations are.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from fourge import __version__
from fourge.checkpoint.writer import PARTIAL_SUFFIX, write_json
from fourge.errors import OutputError
from fourge.layerwise.folders import OWN_FOLDER, differences, read_record, refuse_within
from fourge.models.survey import Source, config_digest, file_digests, header_digest

RUN_NAME = "run.json"
FINGERPRINT_NAME = "fingerprint.json"


def fingerprint(source: Source, recipe: Mapping, data: Mapping, arithmetic: str) -> dict:
    """Everything that the output's bytes depend on.

    ``data`` identifies the files of each pass; ``arithmetic`` is device and dtype, which decide
    roundings and so, a little, what is routed where.
    """
    return {
        "fourge": __version__,
        "source config.json": config_digest(source),
        "source shards": header_digest(source),
        "other source files": file_digests(source),
        "recipe": recipe,
        "data": data,
        "arithmetic": arithmetic,
    }


def check_places(source: Path, out: Path, work: Path | None) -> None:
    """Refuse folders that lie in one another: what a run writes would become its input."""
    refuse_within("output folder", out, "source", source)
    refuse_within("source", source, "output folder", out)
    if work is not None:
        refuse_within("work folder", work, "source", source)
        refuse_within("work folder", work, "output folder", out)


def check_target(out: Path) -> None:
    """Refuse a target that holds what fourge did not make."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; needed is a folder, new or empty.")
    if not out.exists() or any(_is_own(out, name) for name in (FINGERPRINT_NAME, RUN_NAME)):
        return
    # An own folder without a record is what a run leaves that was killed before it began.
    foreign = sorted(path.name for path in out.iterdir() if path.name != OWN_FOLDER)
    own, unfinished = out / OWN_FOLDER, FINGERPRINT_NAME + PARTIAL_SUFFIX
    if own.is_dir():
        files = {path.name for path in own.iterdir() if path.is_file()} - {unfinished}
        foreign += sorted(f"{OWN_FOLDER}/{name}" for name in files)
    if foreign:
        raise OutputError(
            f"{out} is not empty ({foreign[0]}{', ...' if len(foreign) > 1 else ''}) and was not"
            " made by fourge: choose a new folder."
        )


def _is_own(out: Path, name: str) -> bool:
    """Whether a record of fourge's lies in ``out``."""
    record = read_record(out / OWN_FOLDER / name)
    return record is not None and "fourge" in record


def finished_run(out: Path) -> dict | None:
    """The record of the finished run in ``out``, or None."""
    record = read_record(out / OWN_FOLDER / RUN_NAME)
    return record if record is not None and record.get("finished") else None


def check_input(out: Path, mine: dict, chosen_work: Path | None) -> None:
    """OutputError if ``out`` belongs to a run with other input, or one that worked elsewhere."""
    finished = finished_run(out)
    started = read_record(out / OWN_FOLDER / FINGERPRINT_NAME)
    if finished is not None:
        theirs = finished.get("fingerprint")
    elif started is not None:
        theirs = started.get("input")
    else:
        return
    changed = differences(mine, theirs)
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise OutputError(
            f"{out} belongs to a run with other input: {'; '.join(changed[:3])}{more}. Give the"
            " same input to go on, or another output folder to start anew."
        )
    if finished is None and started is not None and started.get("work") != _place(chosen_work):
        option = f"--work {started['work']}" if started.get("work") else "no --work"
        raise OutputError(
            f"the interrupted run in {out} keeps its activations elsewhere: give {option} to go on."
        )


def store_input(out: Path, mine: dict, chosen_work: Path | None) -> None:
    """From now on ``out`` belongs to this input, and works in this place."""
    record = {"fourge": __version__, "work": _place(chosen_work), "input": mine}
    path = out / OWN_FOLDER / FINGERPRINT_NAME
    if read_record(path) != record:
        write_json(path, record)


def _place(chosen_work: Path | None) -> str | None:
    return None if chosen_work is None else str(chosen_work.resolve())


def work_folder(out: Path, chosen: Path | None, inputs: Sequence[dict]) -> Path:
    """Where activations go: within ``out``, or in a folder of this run's own within ``chosen``.
    ``inputs``: of all targets that are made together.
    """
    if chosen is None:
        return out / OWN_FOLDER / "work"
    identity = json.dumps([str(out.resolve()), inputs], sort_keys=True).encode()
    return chosen / f"fourge-{hashlib.sha256(identity).hexdigest()[:16]}"


def remove_work(out: Path, work: Path) -> None:
    """Delete what a finished run no longer needs."""
    shutil.rmtree(work, ignore_errors=True)
    (out / OWN_FOLDER / FINGERPRINT_NAME).unlink(missing_ok=True)
