"""A repair that is killed at any moment: the same command goes on and gives the same bytes."""

from pathlib import Path

import pytest
import torch

from damage import Case
from fourge_process import contents, run
from tensor_edits import edit_tensors

PAIR = "model.layers.1.mlp.experts.5.up_proj.weight_scale_2"
NORM = "model.layers.2.input_layernorm.weight"


@pytest.fixture
def damaged(own: Case) -> Case:
    """Two shards that must be written anew; the others are copied."""
    edit_tensors(own.checkpoint, PAIR, lambda scale: scale * 1.25)
    edit_tensors(own.checkpoint, NORM, torch.zeros_like)
    return own


def repair(case: Case, out: Path, **options: int):
    arguments = ("doctor", case.checkpoint, "--source", case.source, "--repair", out)
    return run(*arguments, **options)


def test_killed_at_any_change_of_the_disk_it_goes_on(damaged: Case, tmp_path: Path):
    done = repair(damaged, tmp_path / "whole")
    assert done.status == 1, done.stderr
    assert "the doctor finds nothing there" in done.stderr
    expected = contents(tmp_path / "whole")
    moment, killed = 1, 0
    while True:
        out = tmp_path / f"out-{moment}"
        if repair(damaged, out, kill_at=moment).status != -9:
            break
        killed += 1
        if (out / "config.json").exists() and not (out / "fourge" / "repairing.json").exists():
            break  # it had finished
        again = repair(damaged, out)
        assert again.status == 1, again.stderr
        found = contents(out)
        assert found.keys() == expected.keys()
        different = [name for name in expected if found[name] != expected[name]]
        assert different == [], f"killed at change {moment}"
        moment = moment + 1 if moment < 6 else moment + 7
    assert killed > 5


def test_a_disk_that_fills_up_is_told_and_the_repair_goes_on(damaged: Case, tmp_path: Path):
    out = tmp_path / "out"
    full = repair(damaged, out, file_limit=20_000)
    assert full.status == 2
    assert "cannot write" in full.stderr
    assert "Traceback" not in full.stderr
    assert repair(damaged, out).status == 1
    assert not list(out.rglob("*.partial"))


def test_a_finished_repair_is_not_overwritten(damaged: Case, tmp_path: Path):
    assert repair(damaged, tmp_path / "out").status == 1
    before = contents(tmp_path / "out")
    again = repair(damaged, tmp_path / "out")
    assert again.status == 2
    assert "is not empty" in again.stderr
    assert contents(tmp_path / "out") == before
