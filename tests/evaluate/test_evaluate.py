"""What ``fourge evaluate`` says: its document, and what the figures in it must do.

test_against_transformers.py holds the figures against an independent computation.
"""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fourge_process import contents, run
from random_checkpoint import FAMILIES, published_config, write_checkpoint, write_input_ids
from tensor_edits import edit_tensors

NUM_LAYERS, TOPK = 4, 32
LONG, BRIEF = 70, 20  # tokens of a window; sparse attention selects in the long ones alone
PLAIN = {
    "tokens", "kl_mean", "kl_median", "kl_p95", "kl_p99", "kl_max", "top1", "ppl_reference",
    "ppl_candidate",
}  # fmt: skip
FIGURES = PLAIN | {
    "kl_mean_interval", "windows", "by_kind", "by_position", "within_topk", "beyond_topk",
    "per_window",
}  # fmt: skip
RECEIPT = {
    "id", "method", "finished_at", "checkpoint", "reference", "data", "context", "index_topk",
    "seed", "lanes", "input_scale", "arithmetic", "device", "machine", "versions",
    "calibration_overlap", "memory_budget_bytes", "seconds", "peak_resident_bytes",
    "peak_device_bytes", "comparable",
}  # fmt: skip

Document = dict[str, Any]


class Case(NamedTuple):
    """A reference, its quantized checkpoint, and tokens of two kinds."""

    reference: Path
    checkpoint: Path
    long: Path
    brief: Path

    @property
    def data(self) -> list[object]:
        return ["--data", self.long, "--data", self.brief]


def quantized(source: Path, data: Path, out: Path) -> Path:
    done = run("quantize", source, out, "--method", "max", "--data", data)
    assert done.status == 0, done.stderr
    return out


def evaluate(*arguments: object) -> Document:
    done = run("evaluate", *arguments, "--json")
    assert done.status == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("case")
    config = published_config(num_hidden_layers=NUM_LAYERS)
    source = write_checkpoint(folder / "source", config=config)
    calibration = write_input_ids(folder / "c.jsonl", sequences=8, length=64, vocab=256, seed=1)
    return Case(
        source,
        quantized(source, calibration, folder / "made"),
        write_input_ids(folder / "long.jsonl", sequences=12, length=LONG, vocab=256, seed=2),
        write_input_ids(folder / "brief.jsonl", sequences=30, length=BRIEF, vocab=256, seed=3),
    )


@pytest.fixture
def own(case: Case, tmp_path: Path) -> Case:
    """The same with a checkpoint that nobody has evaluated."""
    kept = shutil.ignore_patterns("evaluation")
    return case._replace(checkpoint=shutil.copytree(case.checkpoint, tmp_path / "own", ignore=kept))


@pytest.fixture(scope="module")
def document(case: Case) -> Document:
    return evaluate(case.checkpoint, "--reference", case.reference, *case.data)


def all_figures(document: Document) -> dict[str, Document]:
    return document["lanes"] | {"floor": document["floor"]}


def plain_figures(figures: Document) -> list[Document]:
    """Every group of plain figures, the whole first."""
    halves = [figures["within_topk"], figures["beyond_topk"]]
    return [figures, *figures["by_kind"].values(), *figures["by_position"], *halves]


def weighted(parts: list[Document], key: str) -> float:
    parts = [part for part in parts if part["tokens"]]
    total = sum(part["tokens"] for part in parts)
    return sum(part[key] * part["tokens"] for part in parts) / total


# -- the document ---------------------------------------------------------------------------------


def test_the_document_has_every_field_of_its_schema_and_no_other(document: Document):
    assert set(document) == {"lanes", "floor", "layers", "receipt"}
    assert set(document["lanes"]) == {"w4a16", "w4a4"}
    assert set(document["receipt"]) == RECEIPT
    for figures in all_figures(document).values():
        assert set(figures) == FIGURES
        assert all(set(kind) == PLAIN for kind in figures["by_kind"].values())
        assert all(set(part) == PLAIN | {"first", "last"} for part in figures["by_position"])
        assert set(figures["within_topk"]) == set(figures["beyond_topk"]) == PLAIN
        keys = {"kind", "tokens", "kl_mean", "top1", "nll_reference", "nll_candidate"}
        assert all(set(window) == keys for window in figures["per_window"])
    assert [layer["layer"] for layer in document["layers"]] == list(range(NUM_LAYERS))
    for layer in document["layers"]:
        assert set(layer) == {"layer", "w4a16", "w4a4", "floor"}
        for lane in ("w4a16", "w4a4", "floor"):
            assert set(layer[lane]) == {"hidden_error", "router_changed"}


def test_kinds_are_named_for_their_files_and_every_token_but_a_windows_last_is_scored(
    document: Document,
):
    for figures in all_figures(document).values():
        assert figures["windows"] == len(figures["per_window"]) == 42
        assert figures["tokens"] == 12 * (LONG - 1) + 30 * (BRIEF - 1)
        counts = {kind: one["tokens"] for kind, one in figures["by_kind"].items()}
        assert counts == {"long": 12 * (LONG - 1), "brief": 30 * (BRIEF - 1)}
        of_windows = [(one["kind"], one["tokens"]) for one in figures["per_window"]]
        assert of_windows == [("long", LONG - 1)] * 12 + [("brief", BRIEF - 1)] * 30


def test_positions_are_counted_from_a_windows_begin_and_split_at_index_topk(document: Document):
    for figures in all_figures(document).values():
        places = [(one["first"], one["last"], one["tokens"]) for one in figures["by_position"]]
        assert places == [
            (0, 15, 42 * 16),
            (16, 31, 12 * 16 + 30 * 3),
            (32, 63, 12 * 32),
            (64, 127, 12 * 5),
        ]
        assert figures["beyond_topk"]["tokens"] == 12 * (LONG - 1 - TOPK)
        assert figures["within_topk"]["tokens"] == 12 * TOPK + 30 * (BRIEF - 1)


def test_the_parts_make_up_the_whole(document: Document):
    for figures in all_figures(document).values():
        for parts in (
            list(figures["by_kind"].values()),
            figures["by_position"],
            [figures["within_topk"], figures["beyond_topk"]],
            figures["per_window"],
        ):
            assert sum(part["tokens"] for part in parts) == figures["tokens"]
            for key in ("kl_mean", "top1"):
                assert weighted(parts, key) == pytest.approx(figures[key], rel=1e-12, abs=1e-15)
        for model in ("reference", "candidate"):
            nll = weighted(figures["per_window"], f"nll_{model}")
            assert figures[f"ppl_{model}"] == pytest.approx(math.exp(nll), rel=1e-12)


def test_figures_are_in_order(document: Document):
    for lane, figures in all_figures(document).items():
        for one in plain_figures(figures):
            if one["tokens"]:
                quantiles = [one[f"kl_{name}"] for name in ("median", "p95", "p99", "max")]
                assert quantiles == sorted(quantiles)
                assert 0 <= one["kl_mean"] <= one["kl_max"]
                assert 0 <= one["top1"] <= 1
        low, high = figures["kl_mean_interval"]
        assert low <= figures["kl_mean"] <= high
        assert (low < high) == (lane != "floor")


def test_rounding_inputs_as_well_takes_the_candidate_farther_away(document: Document):
    weights, both = document["lanes"]["w4a16"], document["lanes"]["w4a4"]
    assert 0.01 < weights["kl_mean"] < both["kl_mean"] < 1
    assert weights["ppl_reference"] == both["ppl_reference"]
    for layer in document["layers"][1:]:
        assert 0.01 < layer["w4a16"]["hidden_error"] < layer["w4a4"]["hidden_error"] < 1
    # The first router sees the same input; later ones see what rounding has done to theirs.
    assert document["layers"][1]["w4a4"]["router_changed"] == 0
    assert 0 < document["layers"][3]["w4a4"]["router_changed"] < 1


def test_a_dense_layer_is_not_quantized_and_routes_nothing(document: Document):
    for lane in ("w4a16", "w4a4", "floor"):
        assert document["layers"][0][lane] == {"hidden_error": 0, "router_changed": None}


def test_the_receipt_names_what_the_figures_depend_on(case: Case, document: Document):
    receipt = document["receipt"]
    for key, folder in (("checkpoint", case.checkpoint), ("reference", case.reference)):
        files = [*folder.glob("*.safetensors"), folder / "config.json"]
        hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        assert receipt[key] == {"name": folder.name, "files": hashes}
    data = receipt["data"]
    assert (data["tokens"], data["windows"]) == (12 * LONG + 30 * BRIEF, 42)
    for kind, path in zip(data["kinds"], (case.long, case.brief), strict=True):
        assert kind["name"] == path.stem
        (source,) = kind["sources"]
        assert source["name"] == path.name
        assert source["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [(kind["windows"], kind["tokens"]) for kind in data["kinds"]] == [(12, 840), (30, 600)]
    assert receipt["index_topk"] == TOPK
    assert (receipt["context"], receipt["seed"], receipt["device"]) == (4096, 0, "cpu")
    assert receipt["calibration_overlap"] == []
    assert receipt["seconds"] > 0
    assert 100 << 20 < receipt["peak_resident_bytes"] < receipt["memory_budget_bytes"]


def test_calibration_data_is_recognized(case: Case):
    calibration = case.long.with_name("c.jsonl")
    found = evaluate(case.checkpoint, "--reference", case.reference, "--data", calibration)
    assert found["receipt"]["calibration_overlap"] == ["c.jsonl"]


def test_the_record_is_the_document_and_nothing_else_is_changed(own: Case, tmp_path: Path):
    before, reference, work = contents(own.checkpoint), contents(own.reference), tmp_path / "work"
    work.mkdir()
    command = ("evaluate", own.checkpoint, "--reference", own.reference, *own.data)

    done = run(*command, "--work", work, "--json")

    assert done.status == 0, done.stderr
    found = json.loads(done.stdout)
    record = own.checkpoint / "fourge" / "evaluation" / f"{found['receipt']['id']}.json"
    assert json.loads(record.read_text()) == found
    after = contents(own.checkpoint)
    new = {"fourge/evaluation/", record.relative_to(own.checkpoint).as_posix()}
    assert set(after) - set(before) == new
    assert {name: after[name] for name in before} == before
    assert contents(own.reference) == reference
    assert list(work.iterdir()) == []

    written = record.stat().st_mtime_ns
    again = run(*command, "--json")

    assert json.loads(again.stdout) == found
    assert "already done" in again.stderr
    assert record.stat().st_mtime_ns == written


def test_people_read_stderr_and_stdout_stays_empty_without_json(own: Case, document: Document):
    done = run("evaluate", own.checkpoint, "--reference", own.reference, *own.data)
    assert done.status == 0
    assert done.stdout == ""
    for lane in ("w4a16", "w4a4"):
        (line,) = [line for line in done.stderr.splitlines() if line.startswith(lane)]
        assert f"{document['lanes'][lane]['kl_mean']:.5f}" in line
    assert "layer 3, candidate (3 of 4 layers done)" in done.stderr


# -- options --------------------------------------------------------------------------------------


def test_the_same_figures_come_again(case: Case, document: Document, tmp_path: Path):
    found = evaluate(
        case.checkpoint, "--reference", case.reference, *case.data, "--record", tmp_path
    )
    assert found["receipt"]["finished_at"]
    for key in ("lanes", "floor", "layers"):
        assert found[key] == document[key]
    assert found["receipt"]["comparable"] == document["receipt"]["comparable"]


@pytest.mark.parametrize("lane", ["w4a16", "w4a4"])
def test_one_lane_alone_has_the_figures_that_it_has_in_both(
    lane: str, case: Case, document: Document
):
    found = evaluate(case.checkpoint, "--reference", case.reference, *case.data, "--lane", lane)
    assert found["lanes"] == {lane: document["lanes"][lane]}
    assert [layer[lane] for layer in found["layers"]] == [
        layer[lane] for layer in document["layers"]
    ]
    assert found["receipt"]["comparable"] == document["receipt"]["comparable"]


def test_scales_of_single_experts_matter_to_rounded_inputs_alone(case: Case, document: Document):
    found = evaluate(
        case.checkpoint, "--reference", case.reference, *case.data, "--per-expert-input-scale"
    )
    # fourge writes one scale to all experts of a layer.
    assert found["lanes"] == document["lanes"]
    assert found["receipt"]["input_scale"] == "expert"
    assert found["receipt"]["comparable"] != document["receipt"]["comparable"]


def test_a_scale_of_one_expert_reaches_all_experts_or_itself_alone(own: Case, document: Document):
    """A far too large scale of one expert: engines give the largest to the whole layer."""
    ending = "layers.1.mlp.experts.3.down_proj.input_scale"
    assert edit_tensors(own.checkpoint, ending, lambda scale: scale * 4096) == 1
    command = (own.checkpoint, "--reference", own.reference, *own.data)

    layer, expert = evaluate(*command), evaluate(*command, "--per-expert-input-scale")

    assert layer["lanes"]["w4a16"] == expert["lanes"]["w4a16"] == document["lanes"]["w4a16"]
    errors = [one["layers"][1]["w4a4"]["hidden_error"] for one in (document, expert, layer)]
    assert errors[0] < errors[1] < errors[2]


def test_bf16_arithmetic_has_a_floor_below_what_quantization_does(case: Case, document: Document):
    found = evaluate(
        case.checkpoint, "--reference", case.reference, *case.data, "--dtype", "bfloat16"
    )
    assert found["receipt"]["arithmetic"] == {"reference": "float32", "candidate": "bfloat16"}
    assert found["receipt"]["comparable"] != document["receipt"]["comparable"]
    assert 1e-6 < found["floor"]["kl_median"] < found["lanes"]["w4a16"]["kl_median"] / 5
    assert 0 < found["layers"][0]["floor"]["hidden_error"] < 0.02
    assert found["floor"]["ppl_reference"] == document["floor"]["ppl_reference"]
    assert document["receipt"]["arithmetic"]["candidate"] == "float32"
    assert document["floor"]["kl_max"] == 0


def test_tokens_are_shared_by_kinds_cut_at_the_context_and_drawn_by_the_seed(case: Case):
    command = (
        case.checkpoint, "--reference", case.reference, *case.data, "--tokens", 200,
        "--context", 24, "--lane", "w4a16",
    )  # fmt: skip

    first, other = evaluate(*command), evaluate(*command, "--seed", 1)

    for found in (first, other):
        assert [kind["tokens"] for kind in found["receipt"]["data"]["kinds"]] == [100, 100]
        lengths = [one["tokens"] + 1 for one in found["lanes"]["w4a16"]["per_window"]]
        assert lengths == [24, 24, 24, 24, 4, 20, 20, 20, 20, 20]
        nothing = dict.fromkeys(PLAIN) | {"tokens": 0}
        assert found["lanes"]["w4a16"]["beyond_topk"] == nothing
    assert first["receipt"]["data"]["sha256"] != other["receipt"]["data"]["sha256"]
    assert first["lanes"] != other["lanes"]
    assert first["receipt"]["comparable"] != other["receipt"]["comparable"]


def test_kinds_can_be_named_and_files_of_one_kind_are_mixed(case: Case):
    data = ("--data", f"all={case.long}", "--data", f"all={case.brief}")
    found = evaluate(case.checkpoint, "--reference", case.reference, *data, "--lane", "w4a16")
    assert set(found["lanes"]["w4a16"]["by_kind"]) == {"all"}
    (kind,) = found["receipt"]["data"]["kinds"]
    assert (kind["windows"], kind["tokens"]) == (42, 1440)
    assert {source["name"] for source in kind["sources"]} == {"long.jsonl", "brief.jsonl"}


def test_a_single_token_that_follows_is_enough(case: Case, tmp_path: Path):
    data = write_input_ids(tmp_path / "two.jsonl", sequences=1, length=2, vocab=256)
    figures = evaluate(case.checkpoint, "--reference", case.reference, "--data", data)["lanes"]
    one = figures["w4a16"]
    assert one["tokens"] == one["windows"] == 1
    assert one["kl_mean"] == one["kl_median"] == one["kl_max"] > 0
    assert one["kl_mean_interval"] == [one["kl_mean"]] * 2


def test_conversations_of_a_folder_are_evaluated_kind_by_kind(tiny_glm: Path, tmp_path: Path):
    """The reference against itself, through tokenizer and chat template: no distance at all."""
    data = tiny_glm.parent / "evaluation"
    found = evaluate(
        tiny_glm, "--reference", tiny_glm, "--data", data, "--record", tmp_path / "record",
        "--lane", "w4a16", "--tokens", 1500, "--context", 400,
    )  # fmt: skip
    figures = found["lanes"]["w4a16"]
    assert set(figures["by_kind"]) == {"broad", "coding", "deep"}
    assert {kind["tokens"] for kind in found["receipt"]["data"]["kinds"]} == {500}
    assert figures["kl_max"] == 0
    assert figures["top1"] == 1
    # Trained on such conversations, so far better than a guess.
    assert 1 < figures["by_kind"]["deep"]["ppl_candidate"] < 50
    assert not (tiny_glm / "fourge").exists()


def test_another_chat_template_makes_another_evaluation(tiny_glm: Path, tmp_path: Path):
    reference = shutil.copytree(tiny_glm, tmp_path / "reference")
    data = tiny_glm.parent / "evaluation" / "broad.jsonl"
    command = (
        tiny_glm, "--reference", reference, "--data", data,
        "--record", tmp_path / "record", "--lane", "w4a16", "--tokens", 100,
    )  # fmt: skip
    first = evaluate(*command)
    template = reference / "chat_template.jinja"
    template.write_text("Once upon a time" + template.read_text())

    other = evaluate(*command)

    assert other["receipt"]["data"]["sha256"] != first["receipt"]["data"]["sha256"]
    assert other["receipt"]["comparable"] != first["receipt"]["comparable"]


# -- several candidates ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scales of half the weights 1.5 times too large; engines would load it without a word."""
    kept = shutil.ignore_patterns("evaluation")
    folder = tmp_path_factory.mktemp("damaged") / "damaged"
    shutil.copytree(case.checkpoint, folder, ignore=kept)
    assert edit_tensors(folder, "down_proj.weight_scale_2", lambda scale: scale * 1.5) == 18
    return folder


def test_the_better_of_two_candidates_is_told_with_its_interval(
    case: Case, damaged: Path, document: Document
):
    found = evaluate(damaged, case.checkpoint, "--reference", case.reference, *case.data)

    worse, better = found["candidates"]
    assert {key: found[key] for key in worse} == worse
    names = [one["receipt"]["checkpoint"]["name"] for one in found["candidates"]]
    assert names == ["damaged", "made"]
    assert better["lanes"] == document["lanes"]
    assert better["layers"] == document["layers"]
    assert better["receipt"]["comparable"] == document["receipt"]["comparable"]
    for lane in ("w4a16", "w4a4"):
        assert worse["lanes"][lane]["kl_mean"] > 1.2 * better["lanes"][lane]["kl_mean"]
    for mine, theirs, sign in ((worse, better, 1), (better, worse, -1)):
        assert [pair["lane"] for pair in mine["paired"]] == ["w4a16", "w4a4"]
        for pair in mine["paired"]:
            lane = pair["lane"]
            assert pair["other"] == theirs["receipt"]["checkpoint"]["name"]
            assert pair["windows"] == 42
            expected = mine["lanes"][lane]["kl_mean"] - theirs["lanes"][lane]["kl_mean"]
            assert pair["difference"] == pytest.approx(expected, rel=1e-9)
            low, high = pair["interval"]
            assert low < pair["difference"] < high
            assert min(low * sign, high * sign) > 0


def test_every_candidate_gets_its_record(case: Case, damaged: Path, tmp_path: Path):
    own = shutil.copytree(
        case.checkpoint, tmp_path / "own", ignore=shutil.ignore_patterns("evaluation")
    )
    command = (
        own, damaged, own, "--reference", case.reference, *case.data, "--lane", "w4a16",
        "--tokens", 300,
    )  # fmt: skip
    found = evaluate(*command)
    ids = [one["receipt"]["id"] for one in found["candidates"]]
    assert len(set(ids)) == 3
    for folder, one in zip((own, damaged, own), found["candidates"], strict=True):
        record = folder / "fourge" / "evaluation" / f"{one['receipt']['id']}.json"
        assert json.loads(record.read_text()) == one
        assert len(one["paired"]) == 2
    assert found["candidates"][0]["lanes"] == found["candidates"][2]["lanes"]
    assert found["paired"][1]["interval"] == [0, 0]
    assert sorted(path.stem for path in (own / "fourge" / "evaluation").iterdir()) == sorted(
        [ids[0], ids[2]]
    )
    assert evaluate(*command) == found


# -- every family ---------------------------------------------------------------------------------

VARIANTS = {
    **{family: published_config(family) for family in FAMILIES},
    "queries without a latent": published_config("glm4_moe_lite", q_lora_rank=None),
    "shared indexers": published_config(
        num_hidden_layers=5, index_topk_freq=2, index_skip_topk_offset=2
    ),
    "expert groups": published_config("deepseek_v3", n_group=3, topk_group=2),
    "no MTP layer": published_config(num_nextn_predict_layers=0),
    "tied embeddings": published_config(tie_word_embeddings=True),
    "no shared experts": published_config(n_shared_experts=0),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_is_near_its_source_and_the_source_is_itself(name: str, tmp_path: Path):
    config = VARIANTS[name]
    source = write_checkpoint(tmp_path / "source", config=config)
    data = write_input_ids(tmp_path / "ids.jsonl", sequences=6, length=LONG, vocab=256)
    made = quantized(source, data, tmp_path / "made")

    found = evaluate(made, "--reference", source, "--data", data)

    weights, both = found["lanes"]["w4a16"], found["lanes"]["w4a4"]
    assert 1e-3 < weights["kl_mean"] < both["kl_mean"]
    last = found["layers"][-1]
    assert 0.01 < last["w4a16"]["hidden_error"] < last["w4a4"]["hidden_error"] < 0.4
    assert found["floor"]["kl_max"] == 0
    sparse = "index_topk" in config
    assert found["receipt"]["index_topk"] == (TOPK if sparse else None)
    assert weights["beyond_topk"]["tokens"] == (6 * (LONG - 1 - TOPK) if sparse else 0)
    assert len(found["layers"]) == config["num_hidden_layers"]

    itself = evaluate(source, "--reference", source, "--data", data, "--lane", "w4a16")
    assert itself["lanes"]["w4a16"]["kl_max"] == 0
    assert itself["lanes"]["w4a16"]["ppl_candidate"] == weights["ppl_reference"]


def test_the_mtp_layer_changes_no_figure(tmp_path: Path):
    """It is in the source, and was left out of the candidate."""
    source = write_checkpoint(tmp_path / "source", config=published_config())
    data = write_input_ids(tmp_path / "ids.jsonl", sequences=3, length=LONG, vocab=256)
    made = quantized(source, data, tmp_path / "made")
    done = run(
        "quantize", source, tmp_path / "dropped", "--method", "max", "--data", data, "--mtp", "drop"
    )
    assert done.status == 0, done.stderr

    found = [
        evaluate(folder, "--reference", source, "--data", data)["lanes"]
        for folder in (made, tmp_path / "dropped")
    ]
    assert found[0] == found[1]
