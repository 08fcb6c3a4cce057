"""Runs that are killed, interrupted or refused: the next one goes on, and nothing is ever lost."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from fourge_process import Finished, Process, contents, run, run_fresh, start, tensor_bytes_of
from random_checkpoint import published_config, write_checkpoint, write_input_ids

NUM_LAYERS = 8
# Enough layers and tokens that most of a run lies between its first and its last shard.
LONG = published_config(num_hidden_layers=NUM_LAYERS, hidden_size=128, n_routed_experts=16)
SHORT = published_config(num_hidden_layers=2)


class Case(NamedTuple):
    """A run's input and what it makes when nobody disturbs it."""

    source: Path
    data: Path
    whole: dict[str, str]
    seconds: float

    def command(self, out: Path) -> list[object]:
        return ["quantize", self.source, out, "--method", "max", "--data", self.data]


def make_case(folder: Path, config: dict, *, sequences: int, length: int) -> Case:
    source = write_checkpoint(folder / "source", config=config)
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    (source / "generation_config.json").write_text("{}")
    data = write_input_ids(folder / "data.jsonl", sequences=sequences, length=length, vocab=256)
    case = Case(source, data, {}, 0.0)
    run(*case.command(folder / "warm up"))
    began = time.monotonic()
    done = run(*case.command(folder / "out"))
    seconds = time.monotonic() - began
    assert done.status == 0, done.stderr
    return case._replace(whole=contents(folder / "out"), seconds=seconds)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("long"), LONG, sequences=24, length=160)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("short"), SHORT, sequences=3, length=40)


def check_final_names(out: Path, whole: dict[str, str]) -> None:
    """Every file that has a final name already has all its bytes."""
    if not out.exists():
        return
    for path in out.glob("*.safetensors"):
        assert tensor_bytes_of(path) > 0
    there = contents(out)
    for name in set(there) & set(whole):
        assert there[name] == whole[name], name


def refused(result: Finished, *words: str) -> None:
    """Exit status 2, one sentence that holds the words, no traceback."""
    assert result.status == 2, result.stderr
    assert "Traceback" not in result.stderr
    messages = [line for line in result.stderr.splitlines() if line.startswith("fourge: ")]
    assert len(messages) == 1, result.stderr
    for word in words:
        assert word in messages[0]


def half_done(case: Case, out: Path) -> Process:
    """Start a run and come back when its second sparse layer is under way."""
    process = start(*case.command(out))
    wait_for(lambda: (out / shard(3)).exists(), process)
    return process


def wait_for(condition: Callable[[], bool], process: Process) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, process.stderr
        time.sleep(0.002)


def shard(number: int) -> str:
    return f"model-{number:05d}-of-{NUM_LAYERS + 3:05d}.safetensors"


def killed_midway(case: Case, out: Path) -> None:
    process = half_done(case, out)
    process.send(signal.SIGKILL)
    assert process.wait().status == -signal.SIGKILL
    assert not (out / "config.json").exists()


# -- killed ---------------------------------------------------------------------------------------


def test_killed_at_random_instants_it_ends_with_the_bytes_of_an_undisturbed_run(
    long: Case, tmp_path: Path
) -> None:
    chance, kills = random.Random(7), 0
    for round_number in range(8):
        out = tmp_path / str(round_number)
        while True:
            process = start(*long.command(out))
            # Short enough that several kills hit one run; a layer takes about a tenth of it.
            time.sleep(chance.uniform(0.05, 0.6) * long.seconds)
            process.send(signal.SIGKILL)
            ended = process.wait()
            check_final_names(out, long.whole)
            if ended.status == 0:
                break
            assert ended.status == -signal.SIGKILL, ended.stderr
            kills += 1
        assert contents(out) == long.whole
    assert kills >= 8


def test_killed_before_any_change_of_the_file_system_it_ends_with_the_same_bytes(
    short: Case, tmp_path: Path
) -> None:
    """Every rename, deletion and new folder of a run, one after the other."""
    for number in range(1, 200):
        out = tmp_path / str(number)
        first = run(*short.command(out), kill_at=number)
        if first.status == 0:
            break
        assert first.status == -signal.SIGKILL, first.stderr
        check_final_names(out, short.whole)
        again = run(*short.command(out))
        assert again.status == 0, again.stderr
        assert contents(out) == short.whole, f"killed at change {number}"
        shutil.rmtree(out)
    # Renamed at least: 5 shards, 1 statistics file, index, 2 metadata files, 2 records.
    assert number > 11


def test_a_fresh_process_goes_on_where_a_killed_one_was(long: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_midway(long, out)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}

    done = run_fresh(*long.command(out))

    assert done.status == 0, done.stderr
    for name, written in kept.items():
        assert (out / name).stat().st_mtime_ns == written, f"{name} was made twice"
    assert len(kept) >= 3
    assert contents(out) == long.whole


def test_it_goes_on_with_another_memory_budget(long: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_midway(long, out)

    done = run(*long.command(out), "--memory", "2GiB")

    assert done.status == 0, done.stderr
    made = contents(out)
    differing = {name for name in long.whole if made.get(name) != long.whole[name]}
    assert differing <= {"fourge/run.json"}
    assert set(made) == set(long.whole)


# -- interrupted ----------------------------------------------------------------------------------


def test_ctrl_c_ends_with_130_and_a_hint_and_the_same_command_goes_on(
    long: Case, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = half_done(long, out)
    process.send(signal.SIGINT)
    ended = process.wait()

    assert ended.status == 130
    assert "Traceback" not in ended.stderr
    assert "same command" in ended.stderr.splitlines()[-1]
    check_final_names(out, long.whole)
    done = run(*long.command(out))
    assert done.status == 0, done.stderr
    assert contents(out) == long.whole


def test_ctrl_c_while_starting_leaves_no_traceback(long: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(*long.command(out))
    wait_for(out.exists, process)
    process.send(signal.SIGINT)
    ended = process.wait()

    assert ended.status == 130
    assert "Traceback" not in ended.stderr
    assert run(*long.command(out)).status == 0
    assert contents(out) == long.whole


# -- resumed with other input ---------------------------------------------------------------------


def other_data(case: Case, folder: Path) -> tuple[list[object], list[str]]:
    data = write_input_ids(folder / "data.jsonl", sequences=24, length=160, vocab=256, seed=9)
    return ["quantize", case.source, folder / "out", "--method", "max", "--data", data], ["data"]


def other_seed(case: Case, folder: Path) -> tuple[list[object], list[str]]:
    return [*case.command(folder / "out"), "--seed", "5"], ["seed", "0", "5"]


def other_mtp(case: Case, folder: Path) -> tuple[list[object], list[str]]:
    return [*case.command(folder / "out"), "--mtp", "drop"], ["mtp", "bf16", "drop"]


def other_source(case: Case, folder: Path) -> tuple[list[object], list[str]]:
    config = {**LONG, "num_experts_per_tok": 3}
    source = write_checkpoint(folder / "other", config=config)
    for name in ("tokenizer", "generation_config.json"):
        copy = shutil.copytree if (case.source / name).is_dir() else shutil.copyfile
        copy(case.source / name, source / name)
    return ["quantize", source, folder / "out", "--method", "max", "--data", case.data], [
        "config.json"
    ]


def other_shards(case: Case, folder: Path) -> tuple[list[object], list[str]]:
    source = shutil.copytree(case.source, folder / "other")
    split = write_checkpoint(folder / "split", config=LONG, num_shards=3)
    for path in [*source.glob("model*")]:
        path.unlink()
    for path in split.glob("model*"):
        path.rename(source / path.name)
    return ["quantize", source, folder / "out", "--method", "max", "--data", case.data], [
        "source shards"
    ]


def other_copied_file(case: Case, folder: Path) -> tuple[list[object], list[str]]:
    source = shutil.copytree(case.source, folder / "other")
    (source / "generation_config.json").write_text('{"temperature": 1.0}')
    command = ["quantize", source, folder / "out", "--method", "max", "--data", case.data]
    return command, ["generation_config.json"]


OTHERS = [other_data, other_seed, other_mtp, other_source, other_shards, other_copied_file]


def test_other_input_than_the_killed_run_had_is_refused_and_nothing_is_touched(
    long: Case, tmp_path: Path
) -> None:
    killed_midway(long, tmp_path / "out")
    before = contents(tmp_path / "out")

    for number, other in enumerate(OTHERS):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "out").symlink_to(tmp_path / "out")
        command, words = other(long, folder)
        refused(run(*command), *words)
        assert contents(tmp_path / "out") == before, other.__name__

    done = run(*long.command(tmp_path / "out"))
    assert done.status == 0, done.stderr
    assert contents(tmp_path / "out") == long.whole


def test_other_input_than_a_finished_run_had_is_refused(short: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(*short.command(out)).status == 0

    refused(run(*short.command(out), "--seed", "5"), "seed")

    assert contents(out) == short.whole


def test_a_start_that_was_refused_for_its_data_binds_nobody(short: Case, tmp_path: Path) -> None:
    """Nothing was made yet, so the mended file is welcome at the same place."""
    out, data = tmp_path / "out", tmp_path / "data.jsonl"
    data.write_text("not JSON\n")
    refused(run("quantize", short.source, out, "--method", "max", "--data", data), "data.jsonl:1")

    shutil.copyfile(short.data, data)
    done = run("quantize", short.source, out, "--method", "max", "--data", data)

    assert done.status == 0, done.stderr
    assert contents(out) == short.whole


def test_a_finished_output_is_left_as_it_is(short: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(*short.command(out)).status == 0
    before = {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*"))}

    again = run(*short.command(out))

    assert again.status == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*"))} == before
    assert contents(out) == short.whole


# -- two at once, and folders that are not fourge's -----------------------------------------------


def test_a_second_process_on_the_same_output_is_refused(long: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = half_done(long, out)
    first.send(signal.SIGSTOP)
    before = contents(out)
    try:
        refused(run(*long.command(out)), str(out))
        assert contents(out) == before
    finally:
        first.send(signal.SIGCONT)

    ended = first.wait()
    assert ended.status == 0, ended.stderr
    assert contents(out) == long.whole


@pytest.mark.parametrize(
    "name", ["thesis.txt", "model.safetensors", "fourge/setup.py", "fourge/notes.partial"]
)
def test_a_folder_that_holds_something_else_is_refused_and_untouched(
    name: str, short: Case, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("years of work")
    (out / "draft.partial").write_text("a browser's download")
    before = contents(out)

    refused(run(*short.command(out)), str(out))

    assert contents(out) == before


def test_an_output_within_the_source_or_around_it_is_refused(short: Case, tmp_path: Path) -> None:
    around = tmp_path / "around"
    source = shutil.copytree(short.source, around / "source")
    link = tmp_path / "link"
    link.symlink_to(source)
    before = contents(around)

    for out in (source, source / "out", source / "a" / "b", around, link, link / "out"):
        refused(run("quantize", source, out, "--method", "max", "--data", short.data), "source")
        assert contents(around) == before, out


def test_an_empty_folder_is_welcome(short: Case, tmp_path: Path) -> None:
    done = run(*short.command(tmp_path))

    assert done.status == 0, done.stderr
    assert contents(tmp_path) == short.whole


# -- the work folder ------------------------------------------------------------------------------


def test_a_work_folder_keeps_what_else_lies_in_it(short: Case, tmp_path: Path) -> None:
    work = tmp_path / "scratch"
    (work / "thesis").mkdir(parents=True)
    (work / "thesis" / "chapter.txt").write_text("years of work")
    (work / "download.partial").write_text("half a film")
    before = contents(work)

    done = run(*short.command(tmp_path / "out"), "--work", work)

    assert done.status == 0, done.stderr
    assert contents(work) == before
    assert contents(tmp_path / "out") == short.whole


def test_two_outputs_may_use_one_work_folder_after_each_other(
    long: Case, short: Case, tmp_path: Path
) -> None:
    """What a killed run left there is not taken for another run's tokens and activations."""
    work = tmp_path / "scratch"
    process = start(*long.command(tmp_path / "long"), "--work", work)
    wait_for((tmp_path / "long" / shard(3)).exists, process)
    process.send(signal.SIGKILL)
    process.wait()

    other = run(*short.command(tmp_path / "short"), "--work", work)
    if other.status:
        refused(other, str(work))
    else:
        assert contents(tmp_path / "short") == short.whole

    done = run(*long.command(tmp_path / "long"), "--work", work)
    assert done.status == 0, done.stderr
    assert contents(tmp_path / "long") == long.whole


def test_a_run_goes_on_only_where_its_activations_are(long: Case, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "scratch"
    process = start(*long.command(out), "--work", work)
    wait_for((out / shard(3)).exists, process)
    process.send(signal.SIGKILL)
    process.wait()

    refused(run(*long.command(out)), f"--work {work}")
    refused(run(*long.command(out), "--work", tmp_path / "elsewhere"), f"--work {work}")
    assert not (tmp_path / "elsewhere").exists()
    done = run(*long.command(out), "--work", work)
    assert done.status == 0, done.stderr
    assert contents(out) == long.whole
    assert list(work.iterdir()) == []


def test_a_work_folder_within_source_or_output_is_refused(short: Case, tmp_path: Path) -> None:
    before = contents(short.source)
    for work in (short.source, short.source / "work", tmp_path / "out", tmp_path / "out" / "w"):
        refused(run(*short.command(tmp_path / "out"), "--work", work), "work folder", str(work))
    assert contents(short.source) == before
    assert not (tmp_path / "out").exists()


def test_a_refused_start_binds_nothing(short: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(run(*short.command(out), "--memory", "100MiB"), "--memory")
    done = run(*short.command(out), "--seed", 7)
    assert done.status == 0, done.stderr


def test_a_finished_output_that_lost_a_shard_is_told(short: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(*short.command(out)).status == 0
    lost = min(out.glob("*.safetensors"))
    lost.unlink()
    refused(run(*short.command(out)), "no longer whole", lost.name)


def test_times_of_a_resumed_run_count_all_its_layers(long: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_midway(long, out)
    assert run(*long.command(out)).status == 0
    timing = json.loads((out / "fourge" / "run.json").read_text())["timing"]
    assert [layer["layer"] for layer in timing["layers"]] == list(range(NUM_LAYERS))
    total = sum(layer["seconds"] for layer in timing["layers"])
    assert timing["seconds_of_layers"] == pytest.approx(total, abs=0.01)
    assert timing["peak_resident_bytes"] >= timing["layers"][0]["peak_resident_bytes"] > 0


def test_a_run_whose_work_folder_is_lost_recovers_or_says_so(long: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_midway(long, out)
    shutil.rmtree(out / "fourge" / "work")
    before = contents(out)

    again = run(*long.command(out))

    if again.status == 0:
        assert contents(out) == long.whole
    else:
        refused(again, "work")
        shards = {name: digest for name, digest in before.items() if name.endswith("safetensors")}
        assert shards.items() <= contents(out).items()


# -- the disk -------------------------------------------------------------------------------------


def test_a_write_that_fails_ends_in_one_sentence_and_the_same_command_goes_on(
    short: Case, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    undisturbed = sorted((short.source.parent / "out").glob("*.safetensors"))
    sizes = [path.stat().st_size for path in undisturbed]
    assert max(sizes) == sizes[3], "the BF16 MTP layer is the fourth shard and the largest"
    limit = (sizes[3] + sizes[1]) // 2

    refused(run(*short.command(out), file_limit=limit), str(out), "File too large")

    kept = sorted(path.name for path in out.glob("*.safetensors"))
    assert kept == [path.name for path in undisturbed[:3]]
    check_final_names(out, short.whole)
    done = run(*short.command(out))
    assert done.status == 0, done.stderr
    assert contents(out) == short.whole


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_without_room_is_told_before_the_first_layer(long: Case, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=256k tmpfs '{disk}' 2>/dev/null"):
        pytest.skip("mounting is not permitted here")
    try:
        result = run(*long.command(disk / "out"))
        refused(result, str(disk), "free", "MiB")
        assert not list((disk / "out").glob("*.safetensors"))
    finally:
        os.system(f"umount '{disk}'")
