"""config.json, metadata and other files of a repaired checkpoint."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from damage import Case
from fourge.doctor.evidence import Evidence, gather
from fourge.doctor.files import open_files
from fourge.doctor.restoring import Layers, Restored, restore_files

LAYERS = Layers(unquantized=(0,), plain_mtp=(3,), packed_mtp=(), drops_mtp=False, weight_only=False)


def edit_json(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(document | changes, indent=2) + "\n")


def restored(
    case: Case,
    *rules: str,
    layers: Layers = LAYERS,
    source: bool = False,
) -> tuple[Restored, Evidence]:
    evidence = gather(open_files(case.checkpoint))
    evidence.source = gather(open_files(case.source)) if source else None
    evidence.corrected = evidence.raw
    return restore_files(evidence, rules, layers), evidence


def config_of(result: Restored) -> dict[str, Any]:
    return json.loads(result.texts["config.json"])


def test_without_findings_every_file_stays(own: Case):
    result, evidence = restored(own)
    assert result.texts == {}
    small = {name for name in evidence.files.sizes if not name.endswith(".safetensors")}
    statistics = {name for name in evidence.files.sizes if name.startswith("fourge/")}
    assert result.copies.keys() == (small | statistics) - {"model.safetensors.index.json"}


def test_the_producer_and_the_choice_of_the_cache_stay(own: Case):
    cache = {"dynamic": False, "num_bits": 8, "type": "float"}
    block = json.loads((own.checkpoint / "config.json").read_text())["quantization_config"]
    block |= {"producer": {"name": "modelopt", "version": "0.45.0"}, "kv_cache_scheme": cache}
    edit_json(own.checkpoint / "config.json", quantization_config=block | {"ignore": ["x"]})
    result, _ = restored(own, "Q05")
    made = config_of(result)["quantization_config"]
    assert made == block
    nested = json.loads(result.texts["hf_quant_config.json"])
    assert nested["producer"]["version"] == "0.45.0"
    assert nested["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert nested["quantization"]["exclude_modules"] == block["ignore"]


def test_experts_without_input_scales_are_declared_so(own: Case):
    result, _ = restored(own, "A09", layers=replace(LAYERS, weight_only=True))
    block = config_of(result)["quantization_config"]
    assert block["quant_algo"] == "W4A16_NVFP4"
    assert block["config_groups"]["group_0"]["input_activations"] is None
    nested = json.loads(result.texts["hf_quant_config.json"])["quantization"]
    assert nested["quant_algo"] == "W4A16_NVFP4"


def test_a_packed_mtp_layer_keeps_its_head_out_of_the_quantization(own: Case):
    layers = replace(LAYERS, plain_mtp=(), packed_mtp=(3,))
    block = config_of(restored(own, "Q05", layers=layers)[0])["quantization_config"]
    assert "model.layers.3.head" in block["ignore"]
    assert "model.layers.3.*" not in block["ignore"]


def test_keys_become_what_the_tensors_speak_for(own: Case):
    edit_json(
        own.checkpoint / "config.json",
        scoring_func="softmax",
        n_routed_experts=5,
        moe_router_dtype="bfloat16",
        index_share_for_mtp_iteration=True,
    )
    result, _ = restored(own, "C02", "C04", "M09", "M11")
    config = config_of(result)
    assert (config["scoring_func"], config["n_routed_experts"]) == ("sigmoid", 6)
    assert config["moe_router_dtype"] == "float32"
    assert config["index_share_for_mtp_iteration"] is False
    assert result.done.keys() == {"C02", "C04", "M09", "M11"}
    assert "scoring_func" in result.done["C02"]


def test_a_rule_that_nothing_speaks_for_is_not_done(own: Case):
    result, _ = restored(own, "C01", "C06")
    assert result.done == {}
    assert result.texts == {}


def test_with_the_source_the_text_is_the_source_s(own: Case):
    original = (own.checkpoint / "config.json").read_text()
    edit_json(own.checkpoint / "config.json", rope_theta=1, layer_types=["indexed_attention"])
    result, _ = restored(own, "C01", "C06", source=True)
    assert result.texts["config.json"].decode() == original
    assert result.done.keys() == {"C01", "C06"}


def test_the_ids_that_end_a_turn_are_completed_in_both_files(own: Case):
    added = [
        {"content": name, "id": number}
        for number, name in enumerate(("<|endoftext|>", "<|user|>", "<|observation|>"), start=7)
    ]
    edit_json(own.checkpoint / "tokenizer.json", added_tokens=added)
    edit_json(own.checkpoint / "config.json", eos_token_id=7)
    edit_json(own.checkpoint / "generation_config.json", eos_token_id=[9], top_p=0.95)
    result, _ = restored(own, "C07")
    assert config_of(result)["eos_token_id"] == [7, 8, 9]
    generation = json.loads(result.texts["generation_config.json"])
    assert generation == {"eos_token_id": [9, 7, 8], "top_p": 0.95}
    assert "generation_config.json" not in result.copies


@pytest.mark.parametrize("name", ["fourge/repair.json", "model-1.safetensors.partial"])
def test_what_belongs_to_another_repair_is_not_copied(own: Case, name: str):
    (own.checkpoint / name).write_text("{}")
    result, _ = restored(own)
    assert name not in result.copies
