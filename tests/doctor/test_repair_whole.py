"""Repairs of everything around the numbers, from finding to the doctor's word on the result."""

import codecs
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_edits import Folder, expert
from damage import Case
from fourge.doctor.examine import examine, look_at
from fourge.doctor.experts import Depth
from fourge.doctor.repair import repair_and_examine
from fourge_process import contents
from random_checkpoint import published_config, write_checkpoint
from tensor_edits import INDEX

Damage = Callable[[Folder], object]
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"
)  # fmt: skip
NORM = "model.layers.1.input_layernorm.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
# Ends of a turn, and the size of the vocabulary, of the tokenizer of the bundled example.
CONFIG = published_config(vocab_size=2048, eos_token_id=[2027, 2034, 2036])


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, tiny_glm: Path) -> Case:
    """With a tokenizer; nobody may change it."""
    folder = tmp_path_factory.mktemp("whole")
    source = write_checkpoint(folder / "source", config=CONFIG)
    for name in COMPANIONS:
        shutil.copy(tiny_glm / name, source / name)
    return Case.of(source, folder, vocab=2000)


@pytest.fixture
def folder(case: Case, tmp_path: Path) -> Folder:
    return Folder(case.copy(tmp_path).checkpoint)


def repaired(folder: Folder, out: Path, source: Path | None) -> dict[str, Any]:
    evidence = look_at(folder.path, source)
    report = examine(evidence, Depth(), lambda *_: None)
    return repair_and_examine(evidence, report, out, Depth(), lambda *_: None)


def different(left: Path, right: Path) -> list[str]:
    a, b = contents(left), contents(right)
    return [n for n in {**a, **b} if a.get(n) != b.get(n) and n != "fourge/repair.json"]


def cut(part: str) -> Damage:
    def damage(folder: Folder) -> None:
        path = folder.path / folder.shard_of(part)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * 2 // 3])

    return damage


def forget_shard(folder: Folder) -> None:
    file = folder.shard_of("lm_head")
    folder.index(lambda old: {name: shard for name, shard in old.items() if shard != file})


def store_twice(folder: Folder) -> None:
    path = folder.path / folder.shard_of("layers.2.")
    save_file(load_file(path) | {NORM: folder.load(NORM) + 1}, path, metadata={"format": "pt"})


def mark(name: str) -> Damage:
    """A byte order mark in front, as some editors write it."""
    return lambda folder: (folder.path / name).write_bytes(
        codecs.BOM_UTF8 + (folder.path / name).read_bytes()
    )


def remove(name: str) -> Damage:
    return lambda folder: (folder.path / name).unlink()


def drop_expert(folder: Folder) -> None:
    folder.drop(expert(1, 4))


def metadata(**changes: Any) -> Damage:
    return lambda folder: (folder.flat(**changes), folder.nested(**changes))


# Name -> (rule, damage): with and without the source the very bytes come back.
EITHER: dict[str, tuple[str, Damage]] = {
    "shard not in the index": ("K04", forget_shard),
    "tensor misplaced": (
        "K05", lambda f: f.index(lambda old: old | {NORM: f.shard_of("layers.2.")})
    ),
    "index cut off": ("K05", lambda f: (f.path / INDEX).write_text('{"weight_m')),
    "index gone": ("K05", remove(INDEX)),
    "index with a byte order mark": ("K05", mark(INDEX)),
    "config with a byte order mark": ("C06", mark("config.json")),
    "tensor in two shards": ("K03", store_twice),
    "stranger": ("K01", lambda f: f.put({"model.layers.1.foo.bar": torch.zeros(3)})),
    "scale of lm_head": ("S11", lambda f: f.put({"lm_head.input_scale": torch.tensor(0.1)})),
    "scale of the cache": (
        "Q17", lambda f: f.put({"model.layers.1.self_attn.k_proj.k_scale": torch.tensor(1.0)})
    ),
    "MTP not excluded": (
        "M04", lambda f: f.exclude(lambda old: [one for one in old if "layers.3" not in one])
    ),
    "a glob that swallows layers": (
        "Q06", lambda f: f.exclude(lambda old: [*old, "model.layers.1*"])
    ),
    "one expert excluded": (
        "Q07", lambda f: f.exclude(lambda old: [*old, expert(1, 3, "down_proj")])
    ),
    "lists differ": ("Q04", lambda f: f.nested(exclude_modules=["lm_head"])),
    "algorithm in small letters": ("Q03", lambda f: f.flat(quant_algo="nvfp4")),
    "another group size": ("D04", metadata(group_size=32)),
    "MTP denied": ("M01", lambda f: f.config(num_nextn_predict_layers=0)),
    "dense layers": ("C03", lambda f: f.config(first_k_dense_replace=2)),
    "number of experts": ("C04", lambda f: f.config(n_routed_experts=8)),
    "model type": ("C05", lambda f: f.config(model_type="deepseek_v32")),
}  # fmt: skip
# What the source alone can put right.
WITH_SOURCE: dict[str, tuple[str, Damage]] = {
    "norm gone": ("K01", lambda f: f.drop(NORM)),
    "sparse layer cut off": ("K02", cut("layers.2.")),
    "dense layer cut off": ("K02", cut("layers.0.")),
    "MTP layer cut off": ("K02", cut("layers.3.")),
    "MTP partial": ("M02", lambda f: f.drop("model.layers.3.eh_proj.weight")),
    "expert gone": ("K06", drop_expert),
    "block scales gone": ("K06", lambda f: f.drop(expert(1, 4, "up_proj.weight_scale"))),
    "part of an indexer gone": ("X01", lambda f: f.drop("layers.1.self_attn.indexer.wk.weight")),
    "bias in BF16": ("D01", lambda f: f.map(BIAS, torch.Tensor.bfloat16)),
    "bias through BF16": ("D01", lambda f: f.map(BIAS, lambda t: t.bfloat16().float())),
    "shared expert packed": (
        "Q12",
        lambda f: f.put(f.pack("model.layers.1.mlp.shared_experts.down_proj.weight")),
    ),
    "codes of another shape": (
        "D03", lambda f: f.map(expert(1, 4, "up_proj.weight"), lambda t: t.T[:, :8].contiguous())
    ),
    "config gone": ("C06", remove("config.json")),
    "config written anew": ("C06", lambda f: f.config(layer_types=["indexed_attention"] * 3)),
    "epsilon": ("C12", lambda f: f.config(rms_norm_eps=1e-6)),
    "tokenizer gone": ("K13", remove("tokenizer.json")),
    "another template": (
        "C08", lambda f: (f.path / "chat_template.jinja").write_text("{{ messages }}")
    ),
}  # fmt: skip
# Put right without the source too, in config.json's other words.
KEYS: dict[str, tuple[str, Damage]] = {
    "interleaving lost": ("X07", lambda f: f.config(indexer_rope_interleave=None)),
    "scoring lost": ("C02", lambda f: f.config(scoring_func=None)),
    "router in BF16": ("M09", lambda f: f.config(moe_router_dtype="bfloat16")),
    "turns do not end": ("C07", lambda f: f.config(eos_token_id=[2027])),
    "a pattern that one engine reads": (
        "X04", lambda f: f.config(indexer_types=["full", "shared", "full"])
    ),
}  # fmt: skip


def cases(*tables: dict[str, tuple[str, Damage]]) -> Any:
    entries = {name: one for table in tables for name, one in table.items()}
    return pytest.mark.parametrize(("rule", "damage"), entries.values(), ids=list(entries))


@cases(EITHER, WITH_SOURCE, KEYS)
def test_with_the_source_the_very_bytes_come_back(
    case: Case, folder: Folder, tmp_path: Path, rule: str, damage: Damage
):
    damage(folder)
    before = contents(folder.path)
    record = repaired(folder, tmp_path / "out", case.source)
    assert rule in [one["rule"] for one in record["done"]]
    assert (record["not_done"], record["left"]) == ([], [])
    assert different(case.checkpoint, tmp_path / "out") == []
    assert contents(folder.path) == before


@cases(EITHER)
def test_without_the_source_they_come_back_too(
    case: Case, folder: Folder, tmp_path: Path, rule: str, damage: Damage
):
    damage(folder)
    record = repaired(folder, tmp_path / "out", None)
    assert [one["rule"] for one in record["done"]] == [rule]
    assert (record["not_done"], record["left"]) == ([], [])
    assert set(different(case.checkpoint, tmp_path / "out")) <= {"config.json"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((case.checkpoint / "config.json").read_text())


@cases(KEYS)
def test_keys_are_put_right_without_the_source(
    case: Case, folder: Folder, tmp_path: Path, rule: str, damage: Damage
):
    damage(folder)
    record = repaired(folder, tmp_path / "out", None)
    assert [one["rule"] for one in record["done"]] == [rule]
    assert (record["not_done"], record["left"]) == ([], [])
    shards = [name for name in contents(tmp_path / "out") if name.endswith(".safetensors")]
    assert not set(different(case.checkpoint, tmp_path / "out")) & set(shards)


@cases({name: one for name, one in WITH_SOURCE.items() if one[0] not in ("M02", "C06", "C12")})
def test_what_only_the_source_has_is_asked_for(
    folder: Folder, tmp_path: Path, rule: str, damage: Damage
):
    if rule == "C08":
        pytest.skip("without the source nobody knows the template")
    damage(folder)
    record = repaired(folder, tmp_path / "out", None)
    assert record["done"] == []
    assert rule in [one["rule"] for one in record["not_done"]]
    assert {one["why"] for one in record["not_done"]} == {"needs --source"}
    assert not (tmp_path / "out").exists()
    assert [one["rule"] for one in record["left"]] == [one["rule"] for one in record["not_done"]]


def test_names_with_a_wrapper_s_prefix_become_the_published_ones(
    case: Case, folder: Folder, tmp_path: Path
):
    folder.rename(lambda name: name.replace("model.layers.2.", "model.language_model.layers.2."))
    record = repaired(folder, tmp_path / "out", None)
    assert [one["rule"] for one in record["done"]] == ["K07"]
    assert record["left"] == []
    assert Folder(tmp_path / "out").weight_map == Folder(case.checkpoint).weight_map


def test_experts_of_the_mtp_layer_are_taken_apart(case: Case, folder: Folder, tmp_path: Path):
    """BF16, fused as transformers holds them in memory: a range of bytes each."""
    names = {
        name: [expert(3, e, f"{name}.weight") for e in range(6)]
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    own = {name: [folder.load(one) for one in ones] for name, ones in names.items()}
    folder.drop("model.layers.3.mlp.experts.")
    pairs = zip(own["gate_proj"], own["up_proj"], strict=True)
    prefix = "model.layers.3.mlp.experts."
    folder.put({f"{prefix}gate_up_proj": torch.stack([torch.cat(pair) for pair in pairs])})
    folder.put({f"{prefix}down_proj": torch.stack(own["down_proj"])})
    record = repaired(folder, tmp_path / "out", None)
    assert [one["rule"] for one in record["done"]] == ["K07"]
    assert record["left"] == []
    out = Folder(tmp_path / "out")
    for name, ones in names.items():
        assert all(torch.equal(out.load(a), b) for a, b in zip(ones, own[name], strict=True))


def test_a_lost_mtp_layer_is_fetched_or_its_announcement_taken_back(
    case: Case, folder: Folder, tmp_path: Path
):
    shard = folder.shard_of("model.layers.3.")
    folder.drop("model.layers.3.")
    (folder.path / shard).unlink()
    record = repaired(folder, tmp_path / "with", case.source)
    assert [one["rule"] for one in record["done"]] == ["M01"]
    assert record["left"] == []
    assert Folder(tmp_path / "with").weight_map.keys() == Folder(case.checkpoint).weight_map.keys()
    record = repaired(folder, tmp_path / "without", None)
    assert record["left"] == []
    assert Folder(tmp_path / "without").read("config.json")["num_nextn_predict_layers"] == 0


def test_several_accidents_at_once(case: Case, folder: Folder, tmp_path: Path):
    folder.drop(NORM)
    folder.map(expert(1, 5, "up_proj.weight_scale_2"), lambda t: t * 1.25)
    folder.map(expert(2, 4, "down_proj.weight"), lambda t: t << 4 | t >> 4)
    folder.drop(expert(1, 3, "down_proj.input_scale"))
    folder.exclude(lambda old: [*old, "model.layers.1*"])
    folder.config(indexer_rope_interleave=None)
    (folder.path / "tokenizer.json").unlink()
    record = repaired(folder, tmp_path / "out", case.source)
    done = {one["rule"] for one in record["done"]}
    assert done == {"K01", "S04", "V01", "A01", "Q06", "X07", "K13"}
    assert (record["not_done"], record["left"]) == ([], [])
    assert different(case.checkpoint, tmp_path / "out") == []


def test_what_a_repair_did_not_reach_is_said(case: Case, folder: Folder, tmp_path: Path):
    """The source has the same fault, so that copying from it does not help."""
    source = tmp_path / "source"
    shutil.copytree(case.source, source)
    Folder(source).write("generation_config.json", {"eos_token_id": [2027]})
    shutil.copy(source / "generation_config.json", folder.path)
    folder.drop(NORM)
    record = repaired(folder, tmp_path / "out", source)
    assert [one["rule"] for one in record["done"]] == ["K01"]
    assert [one["rule"] for one in record["not_done"]] == ["C07"]
    assert "not enough" in record["not_done"][0]["why"]
    assert [one["rule"] for one in record["left"]] == ["C07"]
    stored = json.loads((tmp_path / "out" / "fourge" / "repair.json").read_text())
    assert stored["left"] == record["left"]
