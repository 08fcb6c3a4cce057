"""What a user sees when something is wrong: one sentence that names it, exit 2, no traceback.

Every message must hold the file, tensor or value that is at fault, and what to do where that is
not plain; whatever was made before stays, and the mended command succeeds.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourge_process import Finished, run, run_fresh
from hollow_checkpoint import GLM_5_1, write_hollow_checkpoint
from random_checkpoint import published_config, write_checkpoint, write_input_ids

CONFIG = published_config()
INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
ATTENTION = "model.layers.2.self_attn.q_b_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that works; tests break a copy of it."""
    return write_checkpoint(tmp_path_factory.mktemp("good") / "model", config=CONFIG)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "ids.jsonl"
    return write_input_ids(path, sequences=4, length=24, vocab=256)


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "model")


def refused(result: Finished, *words: str) -> str:
    """Check that the run ended as a user's mistake should, and return the sentence."""
    assert result.status == 2, result
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    messages = [line for line in result.stderr.splitlines() if line.startswith("fourge: ")]
    assert len(messages) == 1, result.stderr
    assert result.stderr.endswith(messages[0] + "\n")
    assert messages[0].endswith((".", ")", "?"))
    for word in words:
        assert word in messages[0]
    return messages[0]


def misused(result: Finished, *words: str) -> None:
    """As ``refused``, for what the command line itself refuses: usage and a message."""
    assert result.status == 2, result
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    flat = re.sub(r"[\s\u2502]+", " ", result.stderr)
    for word in words:
        assert word in flat


def made(result: Finished) -> None:
    assert result.status == 0, result.stderr


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_tensors(
    folder: Path, near: str, edit: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    """Change the tensors of the shard that holds ``near``; the index follows."""
    path = shard_of(folder, near)
    tensors = load_file(path)
    before = set(tensors)
    edit(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})

    def follow(weight_map: dict[str, str]) -> None:
        for name in before - set(tensors):
            del weight_map[name]
        weight_map.update(dict.fromkeys(tensors, path.name))

    edit_index(folder, follow)


# -- sources that headers tell to be unusable -----------------------------------------------------

Damage = Callable[[Path], tuple[str, ...]]


def no_config(model: Path) -> tuple[str, ...]:
    (model / "config.json").unlink()
    return (str(model / "config.json"),)


def config_is_no_json(model: Path) -> tuple[str, ...]:
    (model / "config.json").write_text("{'model_type': glm}")
    return (str(model / "config.json"), "JSON")


def config_is_a_list(model: Path) -> tuple[str, ...]:
    (model / "config.json").write_text("[]")
    return (str(model / "config.json"), "list")


def config_without_model_type(model: Path) -> tuple[str, ...]:
    edit_config(model, model_type=None)
    return ("model_type",)


def unknown_model_type(model: Path) -> tuple[str, ...]:
    edit_config(model, model_type="glm5_next")
    return ("glm5_next", "glm_moe_dsa")


def config_of_another_size(model: Path) -> tuple[str, ...]:
    edit_config(model, n_routed_experts=8)
    return ("model.layers.1.mlp.experts.6.",)


def width_that_blocks_do_not_divide(model: Path) -> tuple[str, ...]:
    edit_config(model, moe_intermediate_size=24)
    return ("moe_intermediate_size", "24", "16")


def quantized_already(model: Path) -> tuple[str, ...]:
    edit_config(model, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    return ("quantization_config", "fp8", "BF16")


def quantized_by_modelopt(model: Path) -> tuple[str, ...]:
    (model / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    return ("hf_quant_config.json", "BF16")


def fp8_weights(model: Path) -> tuple[str, ...]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    edit_tensors(model, EXPERT, edit)
    return ("model.layers.1.mlp.experts.", "F8_E4M3", "BF16")


def f16_experts(model: Path) -> tuple[str, ...]:
    edit_tensors(model, EXPERT, lambda t: t.update({EXPERT: t[EXPERT].half()}))
    return (EXPERT, "F16", "BF16")


def truncated_shard(model: Path) -> tuple[str, ...]:
    path = shard_of(model, EXPERT)
    path.write_bytes(path.read_bytes()[:-1])
    return (str(path), "truncated")


def shard_cut_within_its_header(model: Path) -> tuple[str, ...]:
    path = shard_of(model, EXPERT)
    path.write_bytes(path.read_bytes()[:100])
    return (str(path), "truncated")


def empty_shard(model: Path) -> tuple[str, ...]:
    path = shard_of(model, EXPERT)
    path.write_bytes(b"")
    return (str(path), "truncated")


def a_git_lfs_pointer(model: Path) -> tuple[str, ...]:
    path = shard_of(model, EXPERT)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    return (str(path),)


def shard_with_a_tail(model: Path) -> tuple[str, ...]:
    path = shard_of(model, EXPERT)
    path.write_bytes(path.read_bytes() + b"\0" * 16)
    return (str(path),)


def missing_shard(model: Path) -> tuple[str, ...]:
    path = shard_of(model, EXPERT)
    path.unlink()
    return (str(path), "missing")


def no_index(model: Path) -> tuple[str, ...]:
    (model / INDEX).unlink()
    return (str(model), INDEX)


def index_is_no_json(model: Path) -> tuple[str, ...]:
    (model / INDEX).write_text("{")
    return (str(model / INDEX),)


def index_names_a_missing_tensor(model: Path) -> tuple[str, ...]:
    name = "model.layers.1.self_attn.q_c_proj.weight"
    edit_index(
        model, lambda weight_map: weight_map.update({name: "model-00002-of-00005.safetensors"})
    )
    return (name, "model-00002-of-00005.safetensors")


def index_lacks_a_tensor(model: Path) -> tuple[str, ...]:
    edit_index(model, lambda weight_map: weight_map.pop(EXPERT))
    return (EXPERT, shard_of(model, ATTENTION).name.replace("4-", "3-"))


def a_shard_the_index_does_not_name(model: Path) -> tuple[str, ...]:
    save_file({"model.extra": torch.zeros(1)}, model / "extra.safetensors")
    return ("extra.safetensors",)


def unknown_tensor(model: Path) -> tuple[str, ...]:
    name = "model.layers.1.mlp.experts.3.bias_proj.weight"
    edit_tensors(model, EXPERT, lambda t: t.update({name: t[EXPERT].clone()}))
    return (name,)


def tensor_of_a_layer_too_many(model: Path) -> tuple[str, ...]:
    name = "model.layers.7.input_layernorm.weight"
    edit_tensors(model, EXPERT, lambda t: t.update({name: torch.ones(64).bfloat16()}))
    return (name,)


def wrong_shape(model: Path) -> tuple[str, ...]:
    edit_tensors(model, EXPERT, lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()}))
    return (EXPERT, "[64, 32]", "[32, 64]")


def missing_tensor(model: Path) -> tuple[str, ...]:
    edit_tensors(model, ATTENTION, lambda t: t.pop(ATTENTION))
    return (ATTENTION, "missing")


def missing_mtp_layer(model: Path) -> tuple[str, ...]:
    path = shard_of(model, "model.layers.3.eh_proj.weight")
    path.unlink()

    def forget(weight_map: dict[str, str]) -> None:
        for name in [name for name, file in weight_map.items() if file == path.name]:
            del weight_map[name]

    edit_index(model, forget)
    return ("MTP", "model.layers.3.", "--mtp drop")


DAMAGES: list[Damage] = [
    no_config,
    config_is_no_json,
    config_is_a_list,
    config_without_model_type,
    unknown_model_type,
    config_of_another_size,
    width_that_blocks_do_not_divide,
    quantized_already,
    quantized_by_modelopt,
    fp8_weights,
    f16_experts,
    truncated_shard,
    shard_cut_within_its_header,
    empty_shard,
    a_git_lfs_pointer,
    shard_with_a_tail,
    missing_shard,
    no_index,
    index_is_no_json,
    index_names_a_missing_tensor,
    index_lacks_a_tensor,
    a_shard_the_index_does_not_name,
    unknown_tensor,
    tensor_of_a_layer_too_many,
    wrong_shape,
    missing_tensor,
    missing_mtp_layer,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_an_unusable_source_is_refused_by_name_before_anything_is_made(
    damage: Damage, model: Path, data: Path, tmp_path: Path
) -> None:
    words = damage(model)

    quantized = refused(run("quantize", model, tmp_path / "out", "--data", data), *words)
    planned = refused(run("plan", model), *words)

    assert quantized == planned
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["plan", "inspect", "quantize"])
@pytest.mark.parametrize("kind", ["absent", "a file", "an empty folder"])
def test_a_source_that_is_no_checkpoint_folder_is_refused(
    verb: str, kind: str, data: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    if kind == "a file":
        source.write_text("weights")
    elif kind == "an empty folder":
        source.mkdir()
    more = [tmp_path / "out", "--data", data] if verb == "quantize" else []

    refused(run(verb, source, *more), str(source))

    assert not (tmp_path / "out").exists()


def test_a_fresh_process_says_the_same(tmp_path: Path) -> None:
    refused(run_fresh("quantize", tmp_path / "none", tmp_path / "out"), "data")
    refused(run_fresh("plan", tmp_path / "none"), str(tmp_path / "none"))


def test_a_source_without_mtp_weights_works_with_mtp_drop(
    model: Path, data: Path, tmp_path: Path
) -> None:
    missing_mtp_layer(model)

    made(run("quantize", model, tmp_path / "out", "--data", data, "--mtp", "drop"))
    made(run("plan", model, "--mtp", "drop"))

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0


# -- weights that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [
        EXPERT,
        "model.layers.2.mlp.experts.5.down_proj.weight",  # an expert that sees no token
        ATTENTION,
        "model.layers.2.mlp.shared_experts.up_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.embed_tokens.weight",
        "model.layers.3.mlp.experts.0.gate_proj.weight",  # MTP
        "lm_head.weight",
    ],
)
def test_a_weight_that_is_not_finite_is_named_and_what_was_made_stays(
    name: str, value: float, good: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    edit_tensors(model, name, spoil)
    command = ["quantize", model, tmp_path / "out", "--data", data]

    refused(run(*command), name)

    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert not (tmp_path / "out" / "config.json").exists()
    # The repaired shard has the same header: the run goes on after the last layer that was good.
    edit_tensors(model, name, lambda t: t.update(load_file(shard_of(good, name))))
    made(run(*command))
    for file, written in kept.items():
        assert (tmp_path / "out" / file).stat().st_mtime_ns == written
    places = {"model.embed_tokens.weight": 0, "lm_head.weight": 5}
    assert len(kept) == (places[name] if name in places else 1 + int(name.split(".")[2]))


# -- recipes --------------------------------------------------------------------------------------

PASS = '[[pass]]\nname = "p"\nsamples = 4\nmax_tokens = 8\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("metod = 'max'\n" + PASS, ("metod", "method")),
        (PASS + "sample = 3\n", ("sample", "samples", "pass p")),
        ("method = 'gptq'\n" + PASS, ("gptq", "max")),
        ("mtp = 'keep'\n" + PASS, ("keep", "bf16", "drop")),
        (PASS.replace("4", "'many'"), ("samples", "many")),
        (PASS.replace("4", "0"), ("samples", "0")),
        (PASS.replace("8", "-8"), ("max_tokens", "-8")),
        ("max_bad_share = 3\n" + PASS, ("max_bad_share", "3")),
        (PASS + PASS, ("p",)),
        ("method = max\n", ("recipe.toml", "line 1")),
        ("", ("recipe.toml", "[[pass]]")),
    ],
)
def test_a_recipe_that_cannot_be_read_is_refused_with_what_is_known(
    text: str, words: tuple[str, ...], good: Path, data: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)

    result = run("quantize", good, tmp_path / "out", "--recipe", recipe, "--data", data)

    assert refused(result, str(recipe), *words) == refused(run("plan", good, "--recipe", recipe))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["demmo", "none/such.toml"])
def test_an_unknown_recipe_is_refused_with_the_known_names(
    name: str, good: Path, tmp_path: Path
) -> None:
    message = refused(run("quantize", good, tmp_path / "out", "--recipe", name), name)

    assert "demo" in message
    assert "glm-5.1" in message


# -- data -----------------------------------------------------------------------------------------


def test_without_data_the_option_is_named(good: Path, tmp_path: Path) -> None:
    refused(run("quantize", good, tmp_path / "out"), "--data")


def test_a_missing_data_file_is_named(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    refused(run("quantize", good, tmp_path / "out", "--data", path), str(path))


def test_data_for_a_pass_that_the_recipe_lacks_is_refused(
    good: Path, data: Path, tmp_path: Path
) -> None:
    result = run(
        "quantize", good, tmp_path / "out", "--recipe", "demo", "--data", "codding=none.jsonl"
    )
    refused(result, "codding", "coding")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("data.jsonl",)),
        ("\n\n", ("data.jsonl",)),
        ('{"input_ids": []}\n', ("data.jsonl:1", "empty")),
        ('{"input_ids": [256]}\n', ("data.jsonl:1", "256", "255")),
        ('{"input_ids": [1, "2"]}\n', ("data.jsonl:1", "input_ids")),
        ('{"prompt": "hello"}\n', ("data.jsonl:1", "prompt", "messages")),
        ('{"text": " "}\n', ("data.jsonl:1", "empty")),
        ('{"messages": [{"role": "wizard", "content": "x"}]}\n', ("data.jsonl:1", "wizard")),
        ('{"messages": []}\n', ("data.jsonl:1",)),
        ("{broken\n", ("data.jsonl:1", "JSON")),
        ("[1, 2]\n", ("data.jsonl:1", "object")),
    ],
)
def test_data_without_a_usable_record_is_refused_with_file_and_line(
    text: str, words: tuple[str, ...], good: Path, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)

    refused(run("quantize", good, tmp_path / "out", "--data", path), *words)


def mixed_data(folder: Path, *, bad: int) -> Path:
    """20 records, ``bad`` of them unusable, from line 3 on."""
    path = write_input_ids(folder / "mixed.jsonl", sequences=20, length=12, vocab=256)
    lines = path.read_text().splitlines()
    lines[2 : 2 + bad] = ["{broken"] * bad
    path.write_text("\n".join(lines) + "\n")
    return path


def test_too_many_bad_records_are_shown_with_their_lines(good: Path, tmp_path: Path) -> None:
    path = mixed_data(tmp_path, bad=4)

    message = refused(run("quantize", good, tmp_path / "out", "--data", path))

    assert "mixed.jsonl:3" in message
    assert "mixed.jsonl:4" in message
    assert "10%" in message
    assert re.search(r"\b[34] of", message)


def test_bad_records_below_the_share_are_counted_and_shown(good: Path, tmp_path: Path) -> None:
    path = mixed_data(tmp_path, bad=2)

    result = run("quantize", good, tmp_path / "out", "--data", path, "--max-bad-share", "0.2")

    made(result)
    record = json.loads((tmp_path / "out" / "fourge" / "run.json").read_text())
    (one,) = record["data"]["passes"]
    assert one["sequences"] == 18
    assert one["bad"]["records"] == 2
    assert ["mixed.jsonl:3" in entry["where"] for entry in one["bad"]["examples"]].count(True) == 1
    assert "2 records unusable" in result.stderr
    assert "left out 2 of 20 records that cannot be used: mixed.jsonl:3:" in result.stderr


def test_no_bad_record_is_tolerated_with_share_zero(good: Path, tmp_path: Path) -> None:
    path = mixed_data(tmp_path, bad=1)
    result = run("quantize", good, tmp_path / "out", "--data", path, "--max-bad-share", "0")
    refused(result, "mixed.jsonl:3")


def test_text_for_a_source_without_tokenizer_is_refused(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "hello"}\n')
    refused(run("quantize", good, tmp_path / "out", "--data", path), str(good), "tokenizer")


def test_conversations_without_a_chat_template_are_refused_and_text_is_not(
    tiny_glm: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_glm, tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    talk, text = tmp_path / "talk.jsonl", tmp_path / "text.jsonl"
    talk.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    text.write_text('{"text": "hello"}\n')

    command = ("quantize", model, tmp_path / "out", "--method", "max", "--data")
    refused(run(*command, talk), "template")
    made(run(*command, text))


# -- memory, devices, sizes -----------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["1MiB", "200MiB"])
@pytest.mark.parametrize("verb", ["plan", "quantize"])
def test_a_budget_that_is_too_small_is_refused_with_one_that_works(
    verb: str, memory: str, good: Path, data: Path, tmp_path: Path
) -> None:
    more = [tmp_path / "out", "--data", data] if verb == "quantize" else []
    command = [verb, good, *more, "--memory"]

    message = refused(run_fresh(*command, memory), "--memory", memory.removesuffix("MiB"))

    sizes = re.findall(r"[\d.]+ ?[MG]iB", message)
    smallest = max(sizes, key=lambda size: float(size[:-3]) * (1024 if "G" in size else 1))
    made(run_fresh(*command, smallest))


@pytest.mark.parametrize("size", ["12 parrots", "0", "-5GiB", "", "GiB", "1e3", "nan"])
def test_a_text_that_is_no_size_is_refused(
    size: str, good: Path, data: Path, tmp_path: Path
) -> None:
    for command in (["plan", good], ["quantize", good, tmp_path / "out", "--data", data]):
        misused(run(*command, f"--memory={size}"), "--memory", repr(size))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--device", "tpu", ("--device", "tpu", "cpu")),
        ("--method", "gptq", ("--method", "gptq", "max")),
        ("--mtp", "keep", ("--mtp", "keep", "drop")),
        ("--seed", "many", ("--seed", "integer")),
        ("--max-bad-share", "half", ("--max-bad-share", "number")),
        ("--memroy", "1GiB", ("--memroy", "--memory")),
    ],
)
def test_an_option_that_is_unknown_or_has_no_such_value_is_refused(
    option: str, value: str, words: tuple[str, ...], good: Path, data: Path, tmp_path: Path
) -> None:
    misused(run("quantize", good, tmp_path / "out", "--data", data, option, value), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "value"), [("--max-bad-share", "2"), ("--seed", "-4")])
def test_a_number_out_of_range_is_refused(
    option: str, value: str, good: Path, data: Path, tmp_path: Path
) -> None:
    result = run("quantize", good, tmp_path / "out", "--data", data, option, value)
    misused(result, option.removeprefix("--").replace("-", "_").split("_")[-1], value)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(good: Path, data: Path, tmp_path: Path) -> None:
    result = run("quantize", good, tmp_path / "out", "--data", data, "--device", "cuda")
    refused(result, "cuda", "cpu")


# -- targets --------------------------------------------------------------------------------------


def test_a_target_that_cannot_be_written_is_named(good: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")

    for out in (file, file / "out", file / "a" / "b", Path("/proc/fourge/out")):
        refused(run("quantize", good, out, "--data", data), str(out))
        assert file.read_text() == "mine"
    result = run("quantize", good, tmp_path / "out", "--data", data, "--work", file / "work")
    refused(result, str(file))


def test_a_disk_that_is_too_small_is_told_at_the_start(tmp_path: Path) -> None:
    """A sparse file of 2 TB or so, whose output no disk of a test machine has room for."""
    config = {
        **GLM_5_1,
        "num_hidden_layers": 2,
        "mlp_layer_types": ["dense", "sparse"],
        "first_k_dense_replace": 1,
        "vocab_size": 150_000_000,
        "num_nextn_predict_layers": 0,
    }
    write_hollow_checkpoint(tmp_path / "model", config, tensors_per_shard=1000)
    data = write_input_ids(tmp_path / "ids.jsonl", sequences=1, length=4, vocab=256)

    result = run("quantize", tmp_path / "model", tmp_path / "out", "--data", data)

    refused(result, str(tmp_path / "out"), "free", "GiB")
    assert not list((tmp_path / "out").glob("*.safetensors"))


# -- JSON -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["plan", "inspect", "quantize"])
def test_json_is_one_document_on_stdout_and_people_read_stderr(
    verb: str, good: Path, data: Path, tmp_path: Path
) -> None:
    more = [tmp_path / "out", "--data", data] if verb == "quantize" else []

    result = run(verb, good, *more, "--json")

    made(result)
    document = json.loads(result.stdout)
    if verb == "quantize":
        assert document == json.loads((tmp_path / "out" / "fourge" / "run.json").read_text())
        assert "tokens per expert" in result.stderr
    else:
        assert result.stderr == ""
        total = sum((good / name).stat().st_size for name in shards(good))
        key = "bytes_in" if verb == "plan" else "bytes"
        assert 0.9 * total < document[key] < total
        assert document["model_type"] == "glm_moe_dsa"


@pytest.mark.parametrize("verb", ["plan", "inspect"])
def test_without_json_nothing_goes_to_stdout(verb: str, good: Path) -> None:
    result = run(verb, good)

    made(result)
    assert result.stdout == ""
    assert "routed experts" in result.stderr


def shards(folder: Path) -> set[str]:
    return set(json.loads((folder / INDEX).read_text())["weight_map"].values())


def test_inspect_reads_what_quantize_wrote(good: Path, data: Path, tmp_path: Path) -> None:
    made(run("quantize", good, tmp_path / "out", "--data", data))

    document = json.loads(run("inspect", tmp_path / "out", "--json").stdout)

    dtypes = {(entry["role"], entry["dtype"]): entry for entry in document["roles"]}
    assert document["quantization"] == "NVFP4"
    # Two sparse layers and six experts of three projections [32, 64] or [64, 32].
    codes = [entry for (_, dtype), entry in dtypes.items() if dtype == "U8"]
    assert [entry["tensors"] for entry in codes] == [36]
    assert [entry["bytes"] for entry in codes] == [36 * 1024]
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert document["bytes"] == index["metadata"]["total_size"]


@pytest.mark.parametrize(
    "damage", [truncated_shard, missing_shard, no_config, index_is_no_json, no_index]
)
def test_inspect_refuses_a_broken_checkpoint_by_name(damage: Damage, model: Path) -> None:
    words = damage(model)
    message = refused(run("inspect", model, "--json"), *words)
    assert message == refused(run("inspect", model))
