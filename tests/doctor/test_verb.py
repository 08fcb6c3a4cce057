"""``fourge doctor`` from outside: exit statuses, JSON alone on stdout, an input left as it was."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint_edits import Folder, expert
from damage import Case
from fourge_process import contents, run


def test_a_sound_checkpoint_ends_with_0(own: Case):
    done = run("doctor", own.checkpoint, "--json")
    assert done.status == 0
    document = json.loads(done.stdout)
    assert document["findings"] == []
    assert "S01" in document["checked"]
    assert "nothing wrong" in done.stderr


def test_an_error_ends_with_1_and_a_warning_with_0(own: Case):
    folder, before = Folder(own.checkpoint), contents(own.checkpoint)
    folder.map(expert(1, 5, "up_proj.input_scale"), lambda t: t * 0)
    damaged = contents(own.checkpoint)
    assert damaged != before
    done = run("doctor", own.checkpoint, "--json")
    assert done.status == 1
    assert contents(own.checkpoint) == damaged
    (finding,) = json.loads(done.stdout)["findings"]
    wanted = {"rule", "severity", "where", "message", "remedy", "engines"}
    assert wanted <= finding.keys()
    assert (finding["rule"], finding["severity"]) == ("A02", "error")
    assert {"vllm", "sglang"} <= finding["engines"].keys()
    folder.map(expert(1, 5, "up_proj.input_scale"), lambda t: t + 1e-3)
    folder.map(expert(1, 5, "gate_proj.input_scale"), lambda t: t * 0 + 1e-3)
    folder.map(expert(1, 5, "down_proj.weight_scale_2"), lambda t: t * 10)
    done = run("doctor", own.checkpoint, "--json")
    assert [one["rule"] for one in json.loads(done.stdout)["findings"]] == ["S05"]
    assert done.status == 0


def nothing(folder: Path) -> None:
    folder.mkdir()


def a_file(folder: Path) -> None:
    folder.write_text("GGUF")


def another_family(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')


def no_folder(folder: Path) -> None:
    (folder.parent / "other").mkdir()


@pytest.mark.parametrize("make", [nothing, a_file, another_family, no_folder])
def test_what_is_no_checkpoint_ends_with_2_and_a_sentence(
    tmp_path: Path, make: Callable[[Path], None]
):
    make(tmp_path / "input")
    done = run("doctor", tmp_path / "input", "--json")
    assert done.status == 2
    assert done.stdout == ""
    assert done.stderr.startswith("fourge: ")
    assert "give" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_unquantized_checkpoint_ends_with_2(own: Case):
    done = run("doctor", own.source)
    assert done.status == 2
    assert "is not quantized" in done.stderr
