"""Repairs: what is exact gives back the very bytes, what is not says how much it changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from damage import Case, examined, rules_of
from fourge.doctor.findings import Finding, found
from fourge.doctor.mending import rescale
from fourge.doctor.repair import repair
from fourge.errors import BudgetError, OutputError
from fourge_process import contents
from random_checkpoint import published_config
from tensor_edits import INDEX, edit_tensors

Edit = Callable[[torch.Tensor], torch.Tensor | None]
CONFIG = published_config(moe_intermediate_size=128)
RECORD = "fourge/repair.json"


@pytest.fixture
def own(make_case: Callable[..., Case], tmp_path: Path) -> Case:
    return make_case("glm_moe_dsa", config=CONFIG).copy(tmp_path)


@pytest.fixture
def original(make_case: Callable[..., Case]) -> Case:
    return make_case("glm_moe_dsa", config=CONFIG)


def expert(layer: int, number: int, rest: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{number}.{rest}"


def mend(
    case: Case, out: Path, *, with_source: bool = True, told: tuple[Finding, ...] = ()
) -> dict[str, Any]:
    """Repair into ``out``; ``told``: findings of rules on headers."""
    evidence, numbers = examined(case.checkpoint, case.source if with_source else None)
    findings = [*numbers.findings, *told]
    return repair(evidence, findings, numbers.diagnoses, out, lambda *_: None)


def different(left: Path, right: Path) -> list[str]:
    """Files that differ, the record of the repair apart."""
    a, b = contents(left), contents(right)
    return [name for name in {**a, **b} if a.get(name) != b.get(name) and name != RECORD]


def read(folder: Path, name: str) -> torch.Tensor:
    return load_file(folder / weight_map(folder)[name])[name]


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def swapped(codes: torch.Tensor) -> torch.Tensor:
    return codes << 4 | codes >> 4


def bytes_of(change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    """An edit of a tensor's bytes."""
    return lambda tensor: change(tensor.view(torch.uint8).clone()).view(tensor.dtype)


def swizzle(data: torch.Tensor) -> torch.Tensor:
    rows, columns = data.shape
    tiles = data.view(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows, columns)


WITH_SOURCE: dict[str, tuple[str, str, Edit]] = {
    "pair apart": ("S04", expert(1, 5, "up_proj.weight_scale_2"), lambda t: t * 1.25),
    "NaN scales": (
        "S01", expert(1, 5, "up_proj.weight_scale"), bytes_of(lambda d: torch.full_like(d, 0x7F))
    ),
    "lost blocks": (
        "S02", expert(1, 5, "down_proj.weight_scale"), bytes_of(lambda d: torch.zeros_like(d))
    ),
    "scale_2 NaN": ("S03", expert(1, 4, "gate_proj.weight_scale_2"), lambda t: t * float("nan")),
    "scales shrunk": ("S06", expert(1, 5, "down_proj.weight_scale"), bytes_of(lambda d: d - 16)),
    "scale_2 wrong": ("S07", expert(2, 5, "down_proj.weight_scale_2"), lambda t: t * 1.25),
    "swizzled": ("S08", expert(2, 5, "gate_proj.weight_scale"), bytes_of(swizzle)),
    "nibbles": ("V01", expert(2, 5, "gate_proj.weight"), swapped),
    "signs": ("V01", expert(2, 5, "up_proj.weight"), lambda t: t ^ 0x88),
    "noise in zeros": ("V05", expert(2, 2, "down_proj.weight"), lambda t: t + 1),
    "input_scale gone": ("A01", expert(1, 2, "down_proj.input_scale"), lambda _: None),
    "input_scale NaN": ("A02", expert(1, 2, "gate_proj.input_scale"), lambda t: t * float("nan")),
    "input_scale smaller": ("A03", expert(1, 2, "gate_proj.input_scale"), lambda t: t * 0.5),
    "norm changed": ("K09", "model.layers.1.input_layernorm.weight", lambda t: t * 2),
    "norm recast": ("K09", "model.layers.1.input_layernorm.weight", torch.Tensor.float),
    "router zeroed": ("K08", "model.layers.2.mlp.gate.weight", torch.zeros_like),
    "MTP damaged": ("K09", expert(3, 4, "up_proj.weight"), lambda t: t.flip(0)),
}  # fmt: skip


@pytest.mark.parametrize(("rule", "ending", "change"), WITH_SOURCE.values(), ids=list(WITH_SOURCE))
def test_with_the_source_the_very_bytes_come_back(
    own: Case, original: Case, tmp_path: Path, rule, ending, change
):
    assert edit_tensors(own.checkpoint, ending, change) == 1
    before = contents(own.checkpoint)
    record = mend(own, tmp_path / "out")
    assert [one["rule"] for one in record["done"]] == [rule]
    assert record["not_done"] == []
    assert different(original.checkpoint, tmp_path / "out") == []
    assert rules_of(tmp_path / "out", own.source) == []
    assert contents(own.checkpoint) == before
    stored = json.loads((tmp_path / "out" / RECORD).read_text())
    assert stored["done"] == record["done"]


WITHOUT_SOURCE = {
    name: WITH_SOURCE[name]
    for name in ("input_scale gone", "input_scale NaN", "input_scale smaller", "scale_2 NaN")
} | {
    "zero block at 448": (
        "S10", expert(1, 0, "gate_proj.weight_scale"),
        bytes_of(lambda d: d.flatten().scatter(0, torch.tensor([0]), 0x7E).view(d.shape)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "ending", "change"), WITHOUT_SOURCE.values(), ids=list(WITHOUT_SOURCE)
)
def test_some_damage_needs_no_source(
    own: Case, original: Case, tmp_path: Path, rule, ending, change
):
    assert edit_tensors(own.checkpoint, ending, change) == 1
    record = mend(own, tmp_path / "out", with_source=False)
    assert [one["rule"] for one in record["done"]] == [rule]
    assert different(original.checkpoint, tmp_path / "out") == []


def test_a_pair_is_brought_together_without_the_source(own: Case, original: Case, tmp_path: Path):
    """A factor of two moves block scales by one exponent: the very bytes come back."""
    prefix = expert(1, 5, "up_proj.weight_scale")
    edit_tensors(own.checkpoint, prefix, bytes_of(lambda data: data - 8))
    edit_tensors(own.checkpoint, prefix + "_2", lambda t: t * 2)
    record = mend(own, tmp_path / "out", with_source=False)
    assert record["done"] == [
        {"rule": "S04", "what": "2 projections given one weight_scale_2 for gate and up"}
    ]
    assert different(original.checkpoint, tmp_path / "out") == []


@pytest.mark.parametrize("factor", [0.3, 0.9, 1.1, 7])
def test_rounding_a_pair_together_tells_the_largest_change(own: Case, tmp_path: Path, factor):
    edit_tensors(own.checkpoint, expert(1, 5, "up_proj.weight_scale_2"), lambda t: t * factor)
    what = mend(own, tmp_path / "out", with_source=False)["done"][0]["what"]
    told = float(what.split("up to ")[1].split("%")[0]) / 100
    largest = 0.0
    for part in ("gate_proj.weight_scale", "up_proj.weight_scale"):
        name = expert(1, 5, part)
        before, after = (
            read(folder, name).double() * read(folder, name + "_2").double()
            for folder in (own.checkpoint, tmp_path / "out")
        )
        largest = max(largest, float(((after - before).abs() / before).max()))
    assert largest == pytest.approx(told, abs=1e-4)
    assert 0 < told < 0.07
    assert rules_of(tmp_path / "out") == []


def test_rescaled_block_scales_stay_numbers_and_never_become_zero():
    every = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for ratio in (0.5, 0.9, 2.0**-12):
        scaled = rescale(every, ratio)
        exact = (every.double() * ratio).clamp(min=2.0**-9) * (every.double() > 0)
        assert (scaled.double() - exact).abs().max() <= (exact * 2.0**-4).max()
        assert (scaled.view(torch.uint8)[1:] > 0).all()
        assert scaled.view(torch.uint8)[0] == 0
    assert torch.equal(rescale(every, 0.5)[16:].double(), every[16:].double() / 2)


@pytest.mark.parametrize(("number", "names"), [(2, ["down_proj"]), (1, ["gate_proj", "up_proj"])])
def test_the_zero_experts_that_modelopt_spoils_are_mended(
    own: Case, original: Case, tmp_path: Path, number: int, names: list[str]
):
    """They have scale_2 0, NaN block scales and codes 0x77; fourge writes what it would have."""
    for name in names:
        prefix = expert(1, number, f"{name}.")
        edit_tensors(own.checkpoint, prefix + "weight", lambda t: torch.full_like(t, 0x77))
        edit_tensors(
            own.checkpoint, prefix + "weight_scale", bytes_of(lambda d: torch.full_like(d, 0xFF))
        )
        edit_tensors(own.checkpoint, prefix + "weight_scale_2", torch.zeros_like)
    record = mend(own, tmp_path / "out", with_source=False)
    assert [one["rule"] for one in record["done"]] == ["S01"]
    assert "of zeros given codes 0 and sound scales" in record["done"][0]["what"]
    assert different(original.checkpoint, tmp_path / "out") == []


def test_a_lost_input_scale_of_a_pair_is_the_other_one_s(own: Case, tmp_path: Path):
    """Gate and up see the same input; other experts see others."""
    values = iter(0.001 * (1 + number) for number in range(1000))
    for number in range(6):
        value = next(values)
        for name in ("gate_proj", "up_proj"):
            put_value(own, expert(1, number, f"{name}.input_scale"), value)
    put_value(own, expert(1, 2, "gate_proj.input_scale"), float("nan"))
    edit_tensors(own.checkpoint, expert(1, 3, "up_proj.input_scale"), lambda _: None)
    done = mend(own, tmp_path / "out", with_source=False)["done"]
    assert {one["rule"] for one in done} == {"A01", "A02"}
    for number in (2, 3):
        for name in ("gate_proj", "up_proj"):
            scale = read(tmp_path / "out", expert(1, number, f"{name}.input_scale"))
            assert scale.item() == pytest.approx(0.001 * (1 + number))


def put_value(case: Case, name: str, value: float) -> None:
    assert edit_tensors(case.checkpoint, name, lambda t: torch.full_like(t, value)) == 1


@pytest.mark.parametrize("part", ["weight_scale_2", "input_scale"])
def test_a_scalar_of_another_shape_becomes_a_scalar(
    own: Case, original: Case, tmp_path: Path, part: str
):
    name = expert(1, 5, f"down_proj.{part}")
    edit_tensors(own.checkpoint, name, lambda t: t.reshape(1, 1))
    mend(own, tmp_path / "out", told=(found("D03", name, ""),))
    assert different(tmp_path / "out", original.checkpoint) == []


def test_a_sign_of_a_block_scale_is_no_matter_of_the_pair(own: Case, tmp_path: Path):
    def negate(scale: torch.Tensor) -> torch.Tensor:
        data = scale.view(torch.uint8).clone()
        data[2, 1] |= 0x80
        return data.view(scale.dtype)

    edit_tensors(own.checkpoint, expert(1, 5, "gate_proj.weight_scale"), negate)
    record = mend(own, tmp_path / "out", with_source=False)
    assert not record["written"]
    assert [(one["rule"], one["why"]) for one in record["not_done"]] == [("S01", "needs --source")]


def test_a_packed_indexer_without_the_source_is_left(own: Case, tmp_path: Path):
    name = "model.layers.1.self_attn.indexer.wk.weight"
    edit_tensors(own.checkpoint, name, lambda t: t.to(torch.float8_e4m3fn))
    record = mend(own, tmp_path / "out", with_source=False, told=(found("X09", name, ""),))
    assert not record["written"]
    assert not (tmp_path / "out").exists()


def test_what_needs_the_source_is_left_and_said(own: Case, tmp_path: Path):
    edit_tensors(
        own.checkpoint,
        expert(1, 5, "down_proj.weight_scale"),
        bytes_of(lambda d: torch.cat([d[:1] * 0 + 0x7F, d[1:]])),
    )
    record = mend(own, tmp_path / "out", with_source=False)
    assert record["done"] == []
    assert record["not_done"][0]["rule"] == "S01"
    assert record["not_done"][0]["why"] == "needs --source"
    assert record["written"] is False
    assert not (tmp_path / "out").exists()


def test_a_sound_checkpoint_is_not_copied(own: Case, tmp_path: Path):
    record = mend(own, tmp_path / "out")
    assert (record["written"], record["done"], record["not_done"]) == (False, [], [])
    assert not (tmp_path / "out").exists()


def test_needless_scales_are_left_out(own: Case, original: Case, tmp_path: Path):
    own.add("lm_head.input_scale", torch.tensor(0.01))
    own.add("model.layers.1.self_attn.k_scale", torch.tensor(0.0))
    record = mend(own, tmp_path / "out", with_source=False)
    assert {one["rule"] for one in record["done"]} == {"S11", "Q16"}
    # The index of the case was written in another form: its content counts.
    assert set(different(original.checkpoint, tmp_path / "out")) <= {INDEX}
    assert (
        json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
        == (json.loads((original.checkpoint / INDEX).read_text())["weight_map"])
    )


def drop_layer(case: Case, layer: int) -> None:
    index = weight_map(case.checkpoint)
    own = [name for name in index if name.startswith(f"model.layers.{layer}.")]
    for file in {index.pop(name) for name in own}:
        assert file not in index.values()
        (case.checkpoint / file).unlink()
    (case.checkpoint / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_a_lost_mtp_layer_comes_from_the_source(own: Case, original: Case, tmp_path: Path):
    drop_layer(own, 3)
    lost = found("M01", "model.layers.3", "the MTP layer is missing")
    record = mend(own, tmp_path / "out", told=(lost,))
    assert [one["rule"] for one in record["done"]] == ["M01"]
    out = tmp_path / "out"
    for name in ("eh_proj.weight", "mlp.experts.5.down_proj.weight", "shared_head.norm.weight"):
        full = f"model.layers.3.{name}"
        assert torch.equal(read(out, full), read(own.source, full))
    assert rules_of(out, own.source) == []
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((original.checkpoint / "config.json").read_text())
    mended = json.loads((out / INDEX).read_text())["weight_map"]
    assert (
        mended.keys() == json.loads((original.checkpoint / INDEX).read_text())["weight_map"].keys()
    )


def test_a_packed_mtp_layer_becomes_what_the_source_has(own: Case, original: Case, tmp_path: Path):
    """SGLang reads no NVFP4 there."""
    for number in range(6):
        for name in ("gate_proj", "up_proj", "down_proj"):
            prefix = expert(3, number, f"{name}.weight")
            w = read(own.checkpoint, prefix)
            edit_tensors(
                own.checkpoint, prefix, lambda t: t.view(torch.uint8)[:, : t.shape[1] // 2]
            )
            own.add(
                prefix + "_scale", torch.ones(w.shape[0], w.shape[1] // 16).to(torch.float8_e4m3fn)
            )
            own.add(prefix + "_scale_2", torch.tensor(0.01))
    told = found("M05", expert(3, 0, "up_proj.weight"), "the MTP layer is quantized")
    record = mend(own, tmp_path / "out", told=(told,))
    assert "M05" in [one["rule"] for one in record["done"]]
    assert different(original.checkpoint, tmp_path / "out") == []


def test_without_the_source_the_declaration_goes(own: Case, tmp_path: Path):
    drop_layer(own, 3)
    lost = found("M01", "model.layers.3", "the MTP layer is missing")
    record = mend(own, tmp_path / "out", with_source=False, told=(lost,))
    assert "set to 0" in record["done"][0]["what"]
    before, after = (
        (folder / "config.json").read_text() for folder in (own.checkpoint, tmp_path / "out")
    )
    assert after == before.replace('"num_nextn_predict_layers": 1', '"num_nextn_predict_layers": 0')


def test_a_truncated_shard_is_made_again_from_the_source(own: Case, original: Case, tmp_path: Path):
    """Of packed experts too; scalars that calibration measured lie before the cut."""
    shard = own.checkpoint / weight_map(own.checkpoint)[expert(2, 5, "down_proj.weight")]
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    truncated = found("K02", shard.name, "the file is truncated")
    record = mend(own, tmp_path / "out", told=(truncated,))
    assert [one["rule"] for one in record["done"]] == ["K02"]
    assert different(original.checkpoint, tmp_path / "out") == []


def test_what_calibration_measured_cannot_come_from_the_source(own: Case, tmp_path: Path):
    """A whole layer is gone: its weights come back, its input scales do not."""
    shard = weight_map(own.checkpoint)[expert(2, 5, "down_proj.weight")]
    (own.checkpoint / shard).unlink()
    record = mend(own, tmp_path / "out", told=(found("K02", shard, "missing"),))
    assert record["done"] == []
    assert record["not_done"][0]["rule"] == "K02"
    assert "calibrate again" in record["not_done"][0]["why"]


def test_a_lost_expert_is_made_again_from_the_source(make_case, tmp_path: Path):
    """The input scales of the other experts of its layer are there."""
    case = make_case("glm_moe_dsa", config=CONFIG).copy(tmp_path)
    for name in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            edit_tensors(case.checkpoint, expert(2, 4, f"{projection}.{name}"), lambda _: None)
    lost = found("K06", expert(2, 4, "gate_proj.weight"), "expert 4 is incomplete")
    record = mend(case, tmp_path / "out", told=(lost,))
    assert [one["rule"] for one in record["done"]] == ["K06"]
    original = make_case("glm_moe_dsa", config=CONFIG).checkpoint
    assert different(original, tmp_path / "out") in ([], [INDEX])


def test_a_config_written_anew_becomes_the_source_s(own: Case, original: Case, tmp_path: Path):
    path = own.checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["layer_types"] = ["indexed_attention"] * 3
    path.write_text(json.dumps(dict(reversed(config.items()))))
    drift = found("C06", "config.json: layer_types", "written anew")
    record = mend(own, tmp_path / "out", told=(drift,))
    assert [one["rule"] for one in record["done"]] == ["C06"]
    assert different(original.checkpoint, tmp_path / "out") == []


def test_metadata_are_made_from_what_is_on_disk(own: Case, original: Case, tmp_path: Path):
    path = own.checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"] = ["model.layers.1"]
    path.write_text(json.dumps(config, indent=2) + "\n")
    (own.checkpoint / "hf_quant_config.json").unlink()
    told = (found("Q01", "hf_quant_config.json", "missing"), found("Q06", "ignore", "too wide"))
    record = mend(own, tmp_path / "out", with_source=False, told=told)
    assert {one["rule"] for one in record["done"]} == {"Q01", "Q06"}
    assert different(original.checkpoint, tmp_path / "out") == []


def test_tensors_that_the_index_misses_or_misplaces_are_put_into_it(
    own: Case, original: Case, tmp_path: Path
):
    path = own.checkpoint / INDEX
    index = json.loads(path.read_text())
    names = list(index["weight_map"])
    del index["weight_map"][names[0]]
    index["weight_map"][names[1]] = index["weight_map"][names[-1]]
    path.write_text(json.dumps(index))
    told = found("K05", names[:2], "the index is wrong")
    mend(own, tmp_path / "out", with_source=False, told=(told,))
    assert different(original.checkpoint, tmp_path / "out") == []


def test_a_tensor_in_two_shards_is_kept_where_the_index_has_it(
    own: Case, original: Case, tmp_path: Path
):
    index = (own.checkpoint / INDEX).read_bytes()
    own.add("model.layers.1.input_layernorm.weight", torch.zeros(64).bfloat16())
    (own.checkpoint / INDEX).write_bytes(index)
    told = found("K03", "model.layers.1.input_layernorm.weight", "in two shards")
    mend(own, tmp_path / "out", with_source=False, told=(told,))
    assert different(original.checkpoint, tmp_path / "out") == []


def test_an_orphan_shard_is_indexed_if_its_tensors_belong_to_the_model(own: Case, tmp_path: Path):
    path = own.checkpoint / INDEX
    index = json.loads(path.read_text())
    file = index["weight_map"]["lm_head.weight"]
    lost = [name for name, shard in index["weight_map"].items() if shard == file]
    for name in lost:
        del index["weight_map"][name]
    path.write_text(json.dumps(index))
    mend(own, tmp_path / "out", with_source=False, told=(found("K04", file, "not in the index"),))
    mended = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert {mended[name] for name in lost} == {file}


def test_lost_files_of_the_tokenizer_come_from_the_source(own: Case, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(own.source, source)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (source / name).write_text("{}")
    (own.checkpoint / "notes.txt").write_text("mine")
    case = Case(source, own.checkpoint)
    mend(case, tmp_path / "out", told=(found("K13", "tokenizer.json", "missing"),))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "notes.txt"} <= names


def test_an_interrupted_repair_goes_on(
    own: Case, original: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    edit_tensors(own.checkpoint, expert(1, 5, "down_proj.weight_scale_2"), lambda t: t * 1.25)
    edit_tensors(own.checkpoint, expert(2, 5, "down_proj.weight_scale_2"), lambda t: t * 1.25)
    out = tmp_path / "out"
    from fourge.doctor import rewriting

    whole, calls = rewriting._write_shard, []

    def stop(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        whole(*arguments)

    monkeypatch.setattr(rewriting, "_write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        mend(own, out)
    assert not (out / "config.json").exists()
    (first,) = [path for path in out.glob("*.safetensors") if path.name == calls[0][1].file]
    stamp = first.stat().st_mtime_ns
    mend(own, out)
    assert len(calls) == 3
    assert first.stat().st_mtime_ns == stamp
    assert different(original.checkpoint, out) == []


def test_another_repair_does_not_go_on_from_an_interrupted_one(own: Case, tmp_path: Path):
    out = tmp_path / "out"
    (out / "fourge").mkdir(parents=True)
    (out / "fourge" / "repairing.json").write_text('{"input": "another"}')
    edit_tensors(own.checkpoint, expert(1, 5, "down_proj.weight_scale_2"), lambda t: t * 1.25)
    with pytest.raises(OutputError, match="interrupted repair of another input"):
        mend(own, out)


def test_a_target_that_holds_something_is_refused(own: Case, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match="is not empty"):
        mend(own, tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        mend(own, tmp_path / "file")
    for place in (own.checkpoint, own.checkpoint / "out", own.source / "out", own.source.parent):
        with pytest.raises(OutputError, match="overlaps"):
            mend(own, place)
    assert (tmp_path / "out" / "mine.txt").read_text() == "x"


def test_a_full_disk_is_seen_before_anything_is_written(
    own: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    edit_tensors(own.checkpoint, expert(1, 5, "down_proj.weight_scale_2"), lambda t: t * 1.25)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(BudgetError, match="more: free space"):
        mend(own, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
