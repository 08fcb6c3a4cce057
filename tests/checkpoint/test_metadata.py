"""config.json keeps every byte that it had; the quantization block says what engines read."""

import json
from pathlib import Path

import pytest

from fourge.checkpoint.metadata import (
    copy_files,
    exclude_list,
    hf_quant_config,
    other_files,
    quantization_config,
    quantized_config_text,
    read_config,
    refuse_quantized,
    with_quantization,
)
from fourge.errors import CheckpointError, ConfigError
from hollow_checkpoint import GLM_5_1

EXCLUDED = exclude_list([0, 1, 2], [78])


def test_the_exclude_list_is_the_recommended_one():
    assert EXCLUDED == [
        "lm_head", "*self_attn*", "*mlp.shared_experts*", "model.layers.0.*", "model.layers.1.*",
        "model.layers.2.*", "model.layers.78.*", "*shared_head*",
    ]  # fmt: skip


@pytest.mark.parametrize("indent", [None, 1, 2, 4, "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["}", "}\n", " }", "\n\n }\n\n"])
def test_only_the_block_is_added_to_the_text(indent: int | str | None, newline: str, end: str):
    text = json.dumps(GLM_5_1, indent=indent).removesuffix("}") + end
    text = text.replace("\n", newline)
    edited = quantized_config_text(text, EXCLUDED, drop_mtp=False)
    assert json.loads(edited) == {**GLM_5_1, "quantization_config": quantization_config(EXCLUDED)}
    assert list(json.loads(edited))[-1] == "quantization_config"
    before = text[: text.rindex("}")].rstrip()
    assert edited.startswith(before + ",")
    assert edited.endswith(text[len(before) :])
    assert edited.count("\n") == edited.count(newline)


def test_odd_numbers_and_spacing_survive():
    text = '{\n    "rms_norm_eps": 1.0e-5,\n    "rope_theta" : 1E6\n}'
    edited = quantized_config_text(text, EXCLUDED, drop_mtp=False)
    assert (
        '    "rms_norm_eps": 1.0e-5,\n    "rope_theta" : 1E6,\n    "quantization_config"' in edited
    )


def test_an_empty_object_and_a_null_block_work():
    for text in ("{}", '{"quantization_config": null}'):
        edited = quantized_config_text(text, EXCLUDED, drop_mtp=False)
        assert json.loads(edited) == {"quantization_config": quantization_config(EXCLUDED)}
        assert edited.count("quantization_config") == 1


def test_dropping_mtp_changes_one_number():
    text = json.dumps(GLM_5_1, indent=2)
    edited = quantized_config_text(text, EXCLUDED, drop_mtp=True)
    assert json.loads(edited)["num_nextn_predict_layers"] == 0
    kept = quantized_config_text(text, EXCLUDED, drop_mtp=False)
    assert edited == kept.replace('"num_nextn_predict_layers": 1', '"num_nextn_predict_layers": 0')


@pytest.mark.parametrize("indent", [None, 2, 4])
def test_a_block_makes_way_for_another_and_nothing_else_changes(indent: int | None):
    text = json.dumps(GLM_5_1, indent=indent) + "\n"
    first = quantized_config_text(text, ["*"], drop_mtp=False)
    assert first != text
    block = quantization_config(EXCLUDED)
    assert with_quantization(first, block, drop_mtp=False) == with_quantization(
        text, block, drop_mtp=False
    )
    nested = json.dumps({"a": {"b": 1, "quantization_config": 2}, "quantization_config": 3})
    edited = json.loads(with_quantization(nested, block, drop_mtp=False))
    assert edited == {"a": {"b": 1, "quantization_config": 2}, "quantization_config": block}


def test_both_files_carry_the_same_list_and_the_keys_that_vllm_demands():
    nested = hf_quant_config(EXCLUDED)["quantization"]
    assert nested == {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": EXCLUDED,
    }
    flat = quantization_config(EXCLUDED)
    assert flat["ignore"] == EXCLUDED
    assert flat["quant_method"] == "modelopt"
    assert flat["config_groups"]["group_0"]["weights"]["num_bits"] == 4


@pytest.mark.parametrize("block", [{"quant_method": "fp8"}, {"quant_method": "modelopt"}, "x"])
def test_a_quantized_source_is_refused(tmp_path: Path, block: object):
    with pytest.raises(CheckpointError, match=r"already quantized.*BF16"):
        refuse_quantized(tmp_path, {"quantization_config": block})


def test_a_source_with_hf_quant_config_is_refused(tmp_path: Path):
    refuse_quantized(tmp_path, {})
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json exists"):
        refuse_quantized(tmp_path, {})


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_an_unreadable_config_is_named(tmp_path: Path, text: str):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(tmp_path)


def test_everything_but_weights_and_metadata_is_copied(tmp_path: Path):
    source, target = tmp_path / "source", tmp_path / "target"
    names = ["tokenizer.json", "chat_template.jinja", ".gitattributes", "assets/logo.bin"]
    for name in [*names, "config.json", "model.safetensors", ".git/config", ".cache/x", "fourge/y"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(name.encode() + b"\0\xff")
    found = other_files(source)
    assert {path.as_posix() for path in found} == set(names)
    target.mkdir()
    copy_files(source, target, found)
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert len([path for path in target.rglob("*") if path.is_file()]) == len(names)
