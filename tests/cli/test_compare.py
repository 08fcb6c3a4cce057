"""fourge compare: one calibration, a checkpoint for each method, figures that evaluate confirms."""

import json
import signal
from pathlib import Path
from typing import get_args

import pytest

from fourge.cli.arguments import MethodChoice
from fourge.quantize.recipe import METHODS
from fourge_process import Finished, contents, run, start
from random_checkpoint import published_config, write_checkpoint, write_input_ids

CONFIG = published_config(num_hidden_layers=3, first_k_dense_replace=1)
ASKED = ("mse", "local-hessian")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    return write_checkpoint(folder / "model", config=CONFIG, traps=False)


@pytest.fixture(scope="module")
def data(source: Path) -> tuple[Path, Path]:
    """For calibration, and held out."""
    vocab = CONFIG["vocab_size"]
    calibration = write_input_ids(source.parent / "a.jsonl", sequences=12, length=80, vocab=vocab)
    held_out = write_input_ids(
        source.parent / "b.jsonl", sequences=12, length=60, vocab=vocab, seed=7
    )
    return calibration, held_out


def command(source: Path, data: tuple[Path, Path], out: Path, *more: object) -> list[object]:
    calibration, held_out = data
    return [
        "compare", source, "--methods", ",".join(ASKED), "--data", calibration, "--holdout",
        held_out, "--out", out, "--tokens", 600, "--context", 60, "--json", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def compared(source: Path, data: tuple[Path, Path]) -> tuple[Finished, Path]:
    out = source.parent / "out"
    done = run(*command(source, data, out))
    assert done.status == 0, done.stderr
    return done, out


def test_max_is_always_there_and_first(compared: tuple[Finished, Path]) -> None:
    rows = json.loads(compared[0].stdout)["methods"]
    assert [row["method"] for row in rows] == ["max", *ASKED]
    for row in rows:
        assert set(row["lanes"]) == {"w4a16", "w4a4"}
        assert row["seconds"] > 0
        assert sum(row["experts"].values()) == 2 * CONFIG["n_routed_experts"]
    plain = rows[0]["lanes"]["w4a16"]
    assert (plain["change"], plain["change_interval"]) == (0.0, [0.0, 0.0])


def test_changes_are_those_of_the_means_with_paired_intervals(
    compared: tuple[Finished, Path],
) -> None:
    document = json.loads(compared[0].stdout)
    records = [json.loads(Path(path).read_text()) for path in document["records"]]
    for row, record in zip(document["methods"], records, strict=True):
        for lane, figures in row["lanes"].items():
            assert figures["kl_mean"] == record["lanes"][lane]["kl_mean"]
            base = records[0]["lanes"][lane]["kl_mean"]
            change = 100 * (figures["kl_mean"] / base - 1)
            assert figures["change"] == pytest.approx(change, abs=1e-6)
            low, high = figures["change_interval"]
            assert low <= change <= high
    by_method = {row["method"]: row["lanes"]["w4a16"]["change"] for row in document["methods"]}
    assert by_method["local-hessian"] < by_method["mse"] < 0


def test_each_checkpoint_is_what_quantize_makes_alone(
    compared: tuple[Finished, Path], source: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    """But for times, and sums that are taken of larger moments: here all need blocks or less."""
    for method in ("max", "mse", "local-hessian"):
        done = run("quantize", source, tmp_path / method, "--method", method, "--data", data[0])
        assert done.status == 0, done.stderr
        assert contents(compared[1] / method) == contents(tmp_path / method)


def test_the_table_names_methods_changes_and_choices(compared: tuple[Finished, Path]) -> None:
    text = compared[0].stderr
    for word in ("w4a16", "w4a4", "against max", "local-hessian", "held-out tokens"):
        assert word in text
    assert "mse: of the experts" in text


def test_the_same_command_again_does_nothing(
    compared: tuple[Finished, Path], source: Path, data: tuple[Path, Path]
) -> None:
    before = contents(compared[1])
    again = run(*command(source, data, compared[1]))
    assert again.status == 0, again.stderr
    assert json.loads(again.stdout) == json.loads(compared[0].stdout)
    assert contents(compared[1]) == before


@pytest.mark.parametrize("kill_at", [10, 40, 90])
def test_a_killed_comparison_goes_on(
    kill_at: int, compared: tuple[Finished, Path], source: Path, data: tuple[Path, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    killed = start(*command(source, data, out), kill_at=kill_at).wait()
    assert killed.status == -signal.SIGKILL
    done = run(*command(source, data, out))
    assert done.status == 0, done.stderr
    for method in ("max", *ASKED):
        assert contents(out / method) == contents(compared[1] / method)
    assert not (out / "work").exists() or not any((out / "work").iterdir())


def test_the_other_verbs_have_all_methods_too() -> None:
    choices, *_ = get_args(get_args(MethodChoice)[0])
    assert get_args(choices) == METHODS


def test_an_unknown_method_is_refused_before_anything_is_done(
    source: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = command(source, data, tmp_path / "out")
    arguments[3] = "max,magic"
    done = run(*arguments)
    assert done.status == 2
    assert "'magic'" in done.stderr
    assert all(method in done.stderr for method in METHODS)
    assert not (tmp_path / "out").exists()


def test_held_out_data_that_are_missing_are_refused_before_anything_is_done(
    source: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    done = run(*command(source, (data[0], tmp_path / "nothing.jsonl"), tmp_path / "out"))
    assert done.status == 2
    assert "nothing.jsonl" in done.stderr
    assert not (tmp_path / "out").exists()


def test_held_out_data_are_needed(source: Path, data: tuple[Path, Path]) -> None:
    done = run("compare", source, "--data", data[0])
    assert done.status == 2
    assert "--holdout" in done.stderr
