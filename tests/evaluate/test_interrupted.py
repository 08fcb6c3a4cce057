"""Evaluations that are killed, interrupted or refused: the next one goes on to the same figures."""

import json
import os
import random
import shutil
import signal
import time
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fourge_process import Finished, Process, contents, run, run_fresh, start
from random_checkpoint import published_config, write_checkpoint, write_input_ids
from tensor_edits import edit_tensors

NUM_LAYERS = 6
LONG = published_config(num_hidden_layers=NUM_LAYERS, n_routed_experts=12)
# A shared indexer takes its selection over from files, which must survive as well.
SHORT = published_config(num_hidden_layers=3, index_topk_freq=2, index_skip_topk_offset=2)
# Every so many changes of the file system one is hit, and so many at the end one by one.
STEP, TAIL = 40, 14
# What a receipt says of the run and not of its result.
OF_THE_RUN = {
    "finished_at",
    "seconds",
    "peak_resident_bytes",
    "peak_device_bytes",
    "memory_budget_bytes",
}


class Case(NamedTuple):
    """An evaluation's input, and what it finds when nobody disturbs it."""

    reference: Path
    candidates: tuple[Path, ...]
    data: Path
    lane: str
    whole: dict[str, Any]
    seconds: float

    def command(self, record: Path) -> list[object]:
        return [
            "evaluate", *self.candidates, "--reference", self.reference, "--data", self.data,
            "--lane", self.lane, "--record", record, "--json",
        ]  # fmt: skip


def make_case(
    folder: Path, config: dict, *, lane: str, candidates: int, sequences: int, length: int
) -> Case:
    reference = write_checkpoint(folder / "reference", config=config)
    data = write_input_ids(folder / "data.jsonl", sequences=sequences, length=length, vocab=256)
    made = []
    for number in range(candidates):
        made.append(folder / f"made-{number}")
        done = run("quantize", reference, made[-1], "--method", "max", "--data", data)
        assert done.status == 0, done.stderr
    case = Case(reference, tuple(made), data, lane, {}, 0.0)
    run(*case.command(folder / "warm up"))
    began = time.monotonic()
    done = run(*case.command(folder / "record"))
    seconds = time.monotonic() - began
    return case._replace(whole=found(done), seconds=seconds)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("long")
    return make_case(folder, LONG, lane="both", candidates=1, sequences=10, length=160)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("short")
    return make_case(folder, SHORT, lane="w4a4", candidates=2, sequences=3, length=40)


def found(done: Finished) -> dict[str, Any]:
    """The document of a run that succeeded, without what differs from run to run."""
    assert done.status == 0, done.stderr
    document = json.loads(done.stdout)
    for one in [document, *document.get("candidates", [])]:
        one["receipt"] = {
            key: value for key, value in one["receipt"].items() if key not in OF_THE_RUN
        }
    return document


def refused(result: Finished, *words: str) -> None:
    """Exit status 2, one sentence that holds the words, no traceback."""
    assert result.status == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    messages = [line for line in result.stderr.splitlines() if line.startswith("fourge: ")]
    assert len(messages) == 1, result.stderr
    for word in words:
        assert word in messages[0]


def wait_for(condition: Callable[[], bool], process: Process) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, process.stderr
        time.sleep(0.002)


def work_of(place: Path) -> Path | None:
    """The work folder of the one evaluation that is under way in ``place``."""
    return next(place.glob("work-*"), None)


def half_done(case: Case, record: Path, *more: object, work: Path | None = None) -> Process:
    """Start an evaluation and come back when layer 2 is done."""
    process = start(*case.command(record), *more)
    wait_for(lambda: any((work or record).glob("work-*/layer-00002.json")), process)
    return process


def killed_midway(case: Case, record: Path, *more: object, work: Path | None = None) -> None:
    process = half_done(case, record, *more, work=work)
    process.send(signal.SIGKILL)
    assert process.wait().status == -signal.SIGKILL
    assert not list(record.glob("*.json"))


def check_left(record: Path, case: Case) -> None:
    """Nothing is there but a record of each candidate."""
    names = sorted(path.name for path in record.iterdir())
    found = case.whole.get("candidates", [case.whole])
    assert names == sorted(f"{one['receipt']['id']}.json" for one in found)


# -- killed ---------------------------------------------------------------------------------------


def test_killed_at_random_instants_it_ends_with_the_figures_of_an_undisturbed_run(
    long: Case, tmp_path: Path
):
    chance, kills, rounds = random.Random(7), 0, 0
    # On a machine that has become quicker than it was, the first rounds may all end unharmed.
    while rounds < 2 or (kills < 2 and rounds < 8):
        record = tmp_path / str(rounds)
        rounds += 1
        while True:
            process = start(*long.command(record))
            time.sleep(chance.uniform(0.1, 0.7) * long.seconds / rounds)
            process.send(signal.SIGKILL)
            ended = process.wait()
            if ended.status == 0:
                break
            assert ended.status == -signal.SIGKILL, ended.stderr
            kills += 1
        assert found(ended) == long.whole
        check_left(record, long)
    assert kills >= 2


def test_killed_before_a_change_of_the_file_system_it_ends_with_the_same_figures(
    short: Case, tmp_path: Path
):
    """Some of the renames, deletions and new folders of a run, and all of the last ones, which
    write the records and clean up.
    """
    before = [contents(folder) for folder in (*short.candidates, short.reference)]

    def kill_and_go_on(number: int) -> bool:
        record = tmp_path / "record"
        shutil.rmtree(record, ignore_errors=True)
        first = run(*short.command(record), kill_at=number)
        if first.status == 0:
            return False
        assert first.status == -signal.SIGKILL, first.stderr
        assert found(run(*short.command(record))) == short.whole, f"killed at change {number}"
        check_left(record, short)
        return True

    beyond = next(number for number in range(1, 1000, STEP) if not kill_and_go_on(number))
    assert beyond > 100
    near = range(beyond - STEP, beyond)
    end = near[0] + bisect_left(near, True, key=lambda number: not kill_and_go_on(number))
    assert all(kill_and_go_on(number) for number in range(end - TAIL, end - 1))
    assert [contents(folder) for folder in (*short.candidates, short.reference)] == before


def test_a_fresh_process_goes_on_where_a_killed_one_was(long: Case, tmp_path: Path):
    killed_midway(long, tmp_path)

    done = run_fresh(*long.command(tmp_path))

    assert found(done) == long.whole
    assert "embedding" not in done.stderr
    for layer in range(3):
        assert f"layer {layer}," not in done.stderr, "done twice"
    assert f"(3 of {NUM_LAYERS} layers done)" in done.stderr
    check_left(tmp_path, long)


def test_it_goes_on_with_another_memory_budget(long: Case, tmp_path: Path):
    killed_midway(long, tmp_path)
    assert found(run(*long.command(tmp_path), "--memory", "2GiB")) == long.whole


def test_a_candidate_that_changed_meanwhile_is_evaluated_as_it_is_now(long: Case, tmp_path: Path):
    (candidate,) = long.candidates
    changed = shutil.copytree(candidate, tmp_path / "changed")
    mine = long._replace(candidates=(changed,))
    record = tmp_path / "record"
    killed_midway(mine, record)
    edit_tensors(changed, "down_proj.weight_scale_2", lambda scale: scale * 2)

    done = found(run(*mine.command(record)))

    assert done["lanes"]["w4a16"]["kl_mean"] > 1.5 * long.whole["lanes"]["w4a16"]["kl_mean"]
    assert done["lanes"] == found(run(*mine.command(tmp_path / "other")))["lanes"]


def test_what_is_found_again_was_the_same_request(long: Case, tmp_path: Path):
    """Other tokens, lanes, scales or arithmetic are other evaluations, of which each has a record;
    memory is not.
    """
    command = long.command(tmp_path)
    assert found(run(*command)) == long.whole
    again = run(*command, "--memory", "3GiB")
    assert "already done" in again.stderr
    assert len(list(tmp_path.iterdir())) == 1
    for number, options in enumerate((["--context", 90], ["--per-expert-input-scale"]), start=2):
        done = run(*command, *options)
        assert done.status == 0, done.stderr
        assert "already done" not in done.stderr
        assert len(list(tmp_path.iterdir())) == number


# -- interrupted ----------------------------------------------------------------------------------


def test_ctrl_c_ends_with_130_and_a_hint_and_the_same_command_goes_on(long: Case, tmp_path: Path):
    process = half_done(long, tmp_path)
    process.send(signal.SIGINT)
    ended = process.wait()

    assert ended.status == 130
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    assert "same command" in ended.stderr.splitlines()[-1]
    done = run(*long.command(tmp_path))
    assert "layer 2," not in done.stderr
    assert found(done) == long.whole
    check_left(tmp_path, long)


def test_ctrl_c_while_starting_leaves_no_traceback(long: Case, tmp_path: Path):
    record = tmp_path / "record"
    process = start(*long.command(record))
    wait_for(record.exists, process)
    process.send(signal.SIGINT)
    ended = process.wait()
    assert ended.status == 130, ended.stderr
    assert "Traceback" not in ended.stderr


# -- two at once, and the work folder -------------------------------------------------------------


def test_a_second_process_on_the_same_evaluation_is_refused_and_another_one_is_not(
    long: Case, tmp_path: Path
):
    first = half_done(long, tmp_path)
    first.send(signal.SIGSTOP)
    work = work_of(tmp_path)
    before = contents(tmp_path)
    try:
        refused(run(*long.command(tmp_path)), "another fourge process", str(work))
        assert contents(tmp_path) == before
        other = run(*long.command(tmp_path), "--seed", 1)
        assert other.status == 0, other.stderr
    finally:
        first.send(signal.SIGCONT)

    assert found(first.wait()) == long.whole
    assert work_of(tmp_path) is None
    assert len(list(tmp_path.iterdir())) == 2


def test_a_work_folder_keeps_what_else_lies_in_it_and_its_own_goes(long: Case, tmp_path: Path):
    work, record = tmp_path / "scratch", tmp_path / "record"
    (work / "thesis").mkdir(parents=True)
    (work / "thesis" / "chapter.txt").write_text("years of work")
    (work / "download.partial").write_text("half a film")
    before = contents(work)

    killed_midway(long, record, "--work", work, work=work)
    done = run(*long.command(record), "--work", work)

    assert found(done) == long.whole
    assert contents(work) == before
    check_left(record, long)


def test_folders_that_were_made_for_it_are_taken_away(short: Case, tmp_path: Path):
    done = run(*short.command(tmp_path / "record"), "--work", tmp_path / "a" / "b")
    assert found(done) == short.whole
    assert [path.name for path in tmp_path.iterdir()] == ["record"]


def test_without_its_work_folder_it_starts_again(long: Case, tmp_path: Path):
    killed_midway(long, tmp_path)
    work = work_of(tmp_path)
    assert work is not None
    shutil.rmtree(work)
    assert found(run(*long.command(tmp_path))) == long.whole


@pytest.mark.parametrize("name", ["reference/hidden-*.bin", "corpus.npz"])
def test_work_that_was_changed_from_outside_is_told(name: str, long: Case, tmp_path: Path):
    killed_midway(long, tmp_path)
    work = work_of(tmp_path)
    assert work is not None
    file = max(work.glob(name))
    os.truncate(file, 100)

    refused(run(*long.command(tmp_path)), str(work), "remove")

    shutil.rmtree(work)
    assert found(run(*long.command(tmp_path))) == long.whole


# -- the disk -------------------------------------------------------------------------------------


def test_a_write_that_fails_ends_in_one_sentence_and_the_same_command_goes_on(
    long: Case, tmp_path: Path
):
    # The reference's hidden states take 10 x 160 rows of 64 float32 values, all other files less.
    limit = 10 * 160 * 64 * 4 - 1
    failed = run(*long.command(tmp_path), file_limit=limit)
    refused(failed, "hidden-00000.bin", "File too large")
    assert found(run(*long.command(tmp_path))) == long.whole


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_without_room_is_told_before_the_first_layer(long: Case, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=256k tmpfs '{disk}' 2>/dev/null"):
        pytest.skip("mounting is not permitted here")
    try:
        result = run(*long.command(tmp_path / "record"), "--work", disk)
        refused(result, str(disk), "free", "MiB", "--work")
        assert "layer 0" not in result.stderr
    finally:
        os.system(f"umount '{disk}'")
