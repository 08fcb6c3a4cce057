"""The model card: its figures, its header, and whose card it may replace."""

from pathlib import Path

import pytest
import yaml

from fourge.reports.card import is_sealed, seal
from fourge_process import contents, run
from reports.conftest import SOURCE_CARD, Recorded, good


def header(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def rows(card: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    lines = card.split(f"{heading}\n", 1)[1].splitlines()
    table = [line for line in lines if line.startswith("|")]
    first = lines.index(table[0])
    cells = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        cells.append([cell.strip() for cell in line.strip("|").split("|")])
    return cells


def test_the_header_names_licence_base_model_and_what_was_done(own: Recorded):
    good("report", own.folder)
    assert header(own.card) == {
        "license": "mit",
        "base_model": "some-org/Some-Model",
        "base_model_relation": "quantized",
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": ["fourge", "modelopt", "nvfp4"],
    }


def test_evaluation_figures_are_those_on_record(own: Recorded):
    good("report", own.folder)
    found = {(row[0], row[1]): row for row in rows(own.card, "## Evaluation")}
    lanes = own.evaluation["lanes"]
    for lane, title in (("w4a16", "W4A16"), ("w4a4", "W4A4")):
        for name, figures in (
            ("all", lanes[lane]),
            ("held-out", lanes[lane]["by_kind"]["held-out"]),
            ("positions beyond index_topk", lanes[lane]["beyond_topk"]),
        ):
            row = found[title, name]
            assert int(row[2].replace(",", "")) == figures["tokens"]
            assert float(row[3]) == pytest.approx(figures["kl_mean"], rel=1e-3)
            assert float(row[7]) == pytest.approx(figures["kl_max"], rel=1e-3)
            assert float(row[8].rstrip("%")) == pytest.approx(100 * figures["top1"], abs=0.01)
            assert float(row[9]) == pytest.approx(figures["ppl_candidate"], rel=1e-4)
            assert float(row[10]) == pytest.approx(figures["ppl_reference"], rel=1e-4)
    receipt = own.evaluation["receipt"]
    assert receipt["id"] in own.card
    assert receipt["data"]["sha256"] in own.card


def test_calibration_and_coverage_are_those_on_record(own: Recorded):
    good("report", own.folder)
    run_record, coverage = own.record("run.json"), own.record("coverage.json")["summary"]
    (row,) = rows(own.card, "## Calibration")
    assert row == ["data", "calibration.jsonl", "4", "280", "1 to 8,192"]
    assert run_record["data"]["sha256"] in own.card
    seen = coverage["experts"] - coverage["never_seen"]
    assert f"{seen} of {coverage['experts']} experts saw calibration tokens" in own.card


def test_what_was_not_measured_is_said_to_be_so(own: Recorded):
    for path in (own.folder / "fourge" / "evaluation").glob("*.json"):
        path.unlink()
    for name in ("run.json", "coverage.json", "doctor.json"):
        (own.folder / "fourge" / name).unlink()
    done = run("report", own.folder)
    assert done.status == 0
    assert done.stderr.count("not measured: ") == 4
    card = (own.folder / "fourge" / "README.md").read_text()
    for heading, said in (
        ("## Calibration", "Not on record."),
        ("### Coverage", "Not measured."),
        ("## Evaluation", "Not measured."),
        ("## Checks", "Not checked by `fourge doctor`."),
    ):
        assert f"{heading}\n\n{said}" in card


def test_the_card_of_the_source_moves_aside(own: Recorded):
    assert own.card == SOURCE_CARD
    good("report", own.folder)
    assert is_sealed(own.card)
    assert (own.folder / "fourge" / "source-README.md").read_text() == SOURCE_CARD
    good("report", own.folder)
    assert header(own.card)["license"] == "mit"


def test_a_card_that_a_person_wrote_stays_unless_forced(own: Recorded):
    (own.folder / "README.md").write_text("# My own words\n")
    done = run("report", own.folder)
    assert done.status == 0
    assert "was written by somebody else and stays" in done.stderr
    assert own.card == "# My own words\n"
    aside = own.folder / "fourge" / "README.md"
    assert is_sealed(aside.read_text())

    good("report", own.folder, "--force")
    assert is_sealed(own.card)
    assert not aside.exists()


def test_a_word_added_by_a_person_makes_it_a_persons_card(own: Recorded):
    good("report", own.folder)
    mine = own.card.replace("## Limits", "I like it.\n\n## Limits")
    (own.folder / "README.md").write_text(mine)
    good("report", own.folder)
    assert own.card == mine


def test_only_an_untouched_seal_holds():
    card = seal("# A card\n")
    assert is_sealed(card)
    assert not is_sealed(card.replace("A card", "A cart"))
    assert not is_sealed(card + "more\n")
    assert not is_sealed("# A card\n")


def test_a_finished_run_stays_finished_and_the_doctor_content(own: Recorded, tmp_path: Path):
    good("report", own.folder)
    done = run("doctor", own.folder, "--source", own.source)
    assert done.status == 0
    assert "nothing wrong" in done.stderr
    before = contents(own.folder)
    calibration = own.source.parent / "calibration.jsonl"
    again = run("quantize", own.source, own.folder, "--method", "max", "--data", calibration)
    assert again.status == 0, again.stderr
    assert "already finished" in again.stderr
    assert contents(own.folder) == before


def test_a_changed_checkpoint_is_told(own: Recorded):
    config = own.folder / "config.json"
    config.write_text(config.read_text() + "\n")
    good("report", own.folder)
    assert "**The checkpoint has changed since this evaluation.**" in own.card
    assert "The checkpoint has changed since." in own.card.split("## Checks")[1]


def test_the_card_has_commands_for_the_machine_that_was_named(own: Recorded):
    """And none where the engine cannot serve it there, which is told."""
    done = run("report", own.folder, "--hardware", "4xh200")
    assert done.status == 0, done.stderr
    serving = own.card.split("## Serving")[1].split("## Limits")[0]
    assert "vllm 0.33.0 on 4xh200:" in serving
    assert f"vllm serve {own.folder.name}" in serving
    assert f"--model-path {own.folder.name}" in serving
    assert str(own.folder.parent) not in own.card

    done = run("report", own.folder, "--hardware", "1xrtx-pro-6000")
    assert "no vllm command on the card: " in done.stderr
    assert "vllm 0.33.0" not in own.card
    assert "sglang 0.5.23 on 1xrtx-pro-6000:" in own.card

    assert run("report", own.folder, "--hardware", "9xabacus").status == 2
