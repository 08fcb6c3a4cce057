"""What a user of ``fourge evaluate`` sees when something is wrong: one sentence that names it.

Exit status 2, nothing on stdout, no traceback, and no record.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fourge_process import Finished, contents, run, run_fresh
from random_checkpoint import published_config, write_checkpoint, write_input_ids
from tensor_edits import INDEX, edit_tensors

CONFIG = published_config(num_hidden_layers=2)
EXPERT = "model.layers.1.mlp.experts.3.down_proj."
CONVERSATION = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("good") / "reference", config=CONFIG)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "ids.jsonl"
    return write_input_ids(path, sequences=4, length=24, vocab=256)


@pytest.fixture(scope="module")
def good(reference: Path, data: Path) -> Path:
    """A checkpoint that works; tests break a copy of it."""
    out = reference.parent / "made"
    done = run("quantize", reference, out, "--method", "max", "--data", data)
    assert done.status == 0, done.stderr
    return out


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


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2))


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Every value of a tensor becomes this one."""
    return lambda tensor: torch.full(tensor.shape, value).to(tensor.dtype)


# -- checkpoints that headers tell to be unusable -------------------------------------------------


def no_config(model: Path) -> tuple[str, ...]:
    (model / "config.json").unlink()
    return (str(model / "config.json"), "missing")


def config_is_no_json(model: Path) -> tuple[str, ...]:
    (model / "config.json").write_text("{'model_type': glm}")
    return (str(model / "config.json"), "JSON")


def unknown_model_type(model: Path) -> tuple[str, ...]:
    edit_config(model, model_type="glm5_next")
    return ("glm5_next", "glm_moe_dsa")


def other_number_of_chosen_experts(model: Path) -> tuple[str, ...]:
    edit_config(model, num_experts_per_tok=3)
    return (str(model), "different models", "num_experts_per_tok is 3 and 2")


def other_rope_base(model: Path) -> tuple[str, ...]:
    edit_config(model, rope_parameters={"rope_theta": 20000.0, "rope_type": "default"})
    return (str(model), "different models", "20000")


def other_number_of_experts(model: Path) -> tuple[str, ...]:
    edit_config(model, n_routed_experts=8)
    return ("model.layers.1.mlp.experts.6.",)


def truncated_shard(model: Path) -> tuple[str, ...]:
    path = max(model.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    return (str(path), "truncated")


def missing_shard(model: Path) -> tuple[str, ...]:
    path = max(model.glob("*.safetensors"))
    path.unlink()
    return (str(path), "missing")


def missing_index(model: Path) -> tuple[str, ...]:
    (model / INDEX).unlink()
    return (str(model),)


def missing_block_scales(model: Path) -> tuple[str, ...]:
    assert edit_tensors(model, EXPERT + "weight_scale", lambda _: None) == 1
    return (EXPERT + "weight_scale", "fourge doctor")


def misshapen_block_scales(model: Path) -> tuple[str, ...]:
    edit_tensors(model, EXPERT + "weight_scale", lambda scale: scale[:, :1])
    return (EXPERT + "weight_scale", "[64, 2]", "[64, 1]")


def missing_input_scale(model: Path) -> tuple[str, ...]:
    edit_tensors(model, EXPERT + "input_scale", lambda _: None)
    return (str(model), "1 expert projections lack input_scale", EXPERT, "--lane w4a16")


DAMAGES = [
    no_config,
    config_is_no_json,
    unknown_model_type,
    other_number_of_chosen_experts,
    other_rope_base,
    other_number_of_experts,
    truncated_shard,
    missing_shard,
    missing_index,
    missing_block_scales,
    misshapen_block_scales,
    missing_input_scale,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_unusable_candidate_is_refused_before_anything_is_made(
    damage: Callable[[Path], tuple[str, ...]],
    model: Path,
    good: Path,
    reference: Path,
    data: Path,
):
    words = damage(model)
    before = contents(model)

    refused(run("evaluate", good, model, "--reference", reference, "--data", data), *words)

    assert contents(model) == before
    assert not (good / "fourge" / "evaluation").exists()


def test_what_is_no_folder_is_refused_by_name(
    good: Path, reference: Path, data: Path, tmp_path: Path
):
    nowhere = tmp_path / "nowhere"
    for place in (nowhere, data):
        refused(
            run("evaluate", place, "--reference", reference, "--data", data),
            f"{place} is not a folder",
        )
        refused(
            run("evaluate", good, "--reference", place, "--data", data), f"{place} is not a folder"
        )
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(run("evaluate", empty, "--reference", reference, "--data", data), str(empty))
    fresh = run_fresh("evaluate", nowhere, "--reference", reference, "--data", data, "--json")
    refused(fresh, f"{nowhere} is not a folder")


def test_a_quantized_reference_is_refused(good: Path, data: Path):
    refused(
        run("evaluate", good, "--reference", good, "--data", data),
        str(good / "config.json"),
        "quantization_config",
        "BF16",
    )


def test_the_reference_may_not_be_of_another_size(good: Path, data: Path, tmp_path: Path):
    other = write_checkpoint(tmp_path / "other", config=published_config(num_hidden_layers=3))
    refused(
        run("evaluate", good, "--reference", other, "--data", data),
        str(good),
        str(other),
        "num_hidden_layers is 2 and 3",
    )


def test_a_source_as_candidate_has_no_lane_with_rounded_inputs(reference: Path, data: Path):
    refused(
        run("evaluate", reference, "--reference", reference, "--data", data),
        "w4a4",
        str(reference),
        "no NVFP4 experts",
        "--lane w4a16",
    )


def test_a_candidate_without_input_scale_has_the_other_lane(
    model: Path, reference: Path, data: Path
):
    assert edit_tensors(model, "input_scale", lambda _: None) == 18
    command = ("evaluate", model, "--reference", reference, "--data", data, "--lane")
    refused(run(*command, "w4a4"), "18 expert projections lack input_scale")
    done = run(*command, "w4a16")
    assert done.status == 0, done.stderr


# -- values that no figure can be made of ---------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        (EXPERT + "weight_scale", float("nan")),
        (EXPERT + "weight_scale_2", float("nan")),
        (EXPERT + "weight_scale_2", float("inf")),
        ("model.layers.0.self_attn.o_proj.weight", float("nan")),
        ("model.embed_tokens.weight", float("-inf")),
        ("model.norm.weight", float("nan")),
        ("lm_head.weight", float("inf")),
    ],
)
def test_a_weight_or_scale_that_is_not_finite_is_named(
    tensor: str, value: float, model: Path, reference: Path, data: Path
):
    assert edit_tensors(model, tensor, filled(value)) == 1
    result = run("evaluate", model, "--reference", reference, "--data", data)
    refused(result, tensor, str(model), "NaN or infinite")
    assert not list((model / "fourge" / "evaluation").glob("*.json"))


def test_a_reference_that_is_not_finite_is_named(good: Path, reference: Path, data: Path):
    damaged = shutil.copytree(reference, data.parent / "damaged reference")
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    edit_tensors(damaged, name, filled(float("nan")))
    refused(
        run("evaluate", good, "--reference", damaged, "--data", data, "--record", data.parent),
        name,
        str(damaged),
    )


def test_scales_so_large_that_results_overflow_are_told(model: Path, reference: Path, data: Path):
    edit_tensors(model, EXPERT + "weight_scale_2", filled(1e38))
    refused(
        run("evaluate", model, "--reference", reference, "--data", data),
        f"layer 1 of {model}",
        "w4a16",
        "fourge doctor",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_an_input_scale_that_is_no_positive_number_is_named(
    value: float, model: Path, reference: Path, data: Path
):
    """For one expert alone where each has its own, for all where the largest counts."""
    ending = EXPERT.removeprefix("model.") + "input_scale"
    edit_tensors(model, ending, filled(value))
    command = ("evaluate", model, "--reference", reference, "--data", data, "--lane")
    refused(run(*command, "w4a4", "--per-expert-input-scale"), ending, str(model), str(value))
    if value != value or value > 0:
        refused(run(*command, "w4a4"), ending, "--lane w4a16")
    done = run(*command, "w4a16", "--json")
    assert done.status == 0, done.stderr
    assert 0 < json.loads(done.stdout)["lanes"]["w4a16"]["kl_mean"] < 1


# -- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no sample", "0 records of bad.jsonl"]),
        ("not JSON\n", ["bad.jsonl:1", "not JSON"]),
        ('{"input_ids": [1, 999]}\n', ["bad.jsonl:1", "999", "0 to 255"]),
        ('{"input_ids": [7]}\n', ["1 records of bad.jsonl", "1 shorter than 2 tokens"]),
        ('{"prompt": "hi"}\n', ["bad.jsonl:1"]),
        (json.dumps(CONVERSATION) + "\n", ["no tokenizer", "tokenizer.json"]),
        ('{"text": "hi"}\n', ["no tokenizer", "tokenizer.json"]),
    ],
)
def test_data_without_a_usable_record_is_refused_by_file_and_line(
    text: str, words: list[str], good: Path, reference: Path, tmp_path: Path
):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(text)
    record = tmp_path / "record"
    result = run("evaluate", good, "--reference", reference, "--data", bad, "--record", record)
    message = refused(result, *words)
    assert "recipe" not in message, "evaluate has none"
    assert not record.exists()


def test_data_that_is_not_there_is_named(good: Path, reference: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for item, word in (
        (tmp_path / "nowhere.jsonl", "nowhere.jsonl"),
        (f"coding={tmp_path / 'nowhere.jsonl'}", "nowhere.jsonl"),
        (tmp_path / "empty", "no .jsonl or .parquet"),
    ):
        refused(run("evaluate", good, "--reference", reference, "--data", item), word)


def test_too_few_tokens_for_the_kinds_are_told(good: Path, reference: Path, data: Path):
    kinds = [option for name in "abc" for option in ("--data", f"{name}={data}")]
    command = ("evaluate", good, "--reference", reference, *kinds, "--tokens")
    refused(run(*command, 5), "5 tokens", "3 kinds", "--tokens")
    assert run(*command, 6, "--record", data.parent / "six").status == 0


def test_more_kinds_than_can_be_told_apart_are_refused(good: Path, reference: Path, tmp_path: Path):
    for number in range(257):
        (tmp_path / f"{number}.jsonl").write_text('{"input_ids": [1, 2]}\n')
    command = ("evaluate", good, "--reference", reference, "--data")
    refused(run(*command, tmp_path), "257 kinds", "256", "--data KIND=")
    done = run(*command, f"all={tmp_path}", "--record", tmp_path / "record")
    assert done.status == 0, done.stderr


# -- the machine and the options ------------------------------------------------------------------


def test_too_little_memory_is_refused_with_an_amount_that_works(
    good: Path, reference: Path, data: Path, tmp_path: Path
):
    command = ("evaluate", good, "--reference", reference, "--data", data, "--record", tmp_path)
    message = refused(run(*command, "--memory", "100MiB"), "100.0 MiB", "--memory")
    enough = re.search(r"Give --memory (\S+)", message)
    assert enough is not None
    done = run(*command, "--memory", enough[1])
    assert done.status == 0, done.stderr
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_a_gpu_that_is_not_there_is_refused(good: Path, reference: Path, data: Path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = run("evaluate", good, "--reference", reference, "--data", data, "--device", "cuda")
    refused(result, "--device cuda", "--device cpu")


def test_places_that_cannot_be_written_are_named(
    good: Path, reference: Path, data: Path, tmp_path: Path
):
    file = tmp_path / "file"
    file.write_text("mine")
    command = ("evaluate", good, "--reference", reference, "--data", data)
    refused(run(*command, "--record", file), f"cannot write {file}")
    refused(run(*command, "--record", file / "within"), f"cannot write {file / 'within'}")
    refused(run(*command, "--work", file, "--record", tmp_path / "r"), f"cannot write {file}")
    refused(run(*command, "--record", "/proc/records"), "cannot write /proc/records")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "mine"


def test_a_record_that_is_not_whole_is_made_again(
    good: Path, reference: Path, data: Path, tmp_path: Path
):
    command = (
        "evaluate", good, "--reference", reference, "--data", data, "--record", tmp_path, "--json",
    )  # fmt: skip
    document = json.loads(run(*command).stdout)
    (record,) = tmp_path.iterdir()
    for text in ("", "{", "[]", "{}"):
        record.write_text(text)
        again = run(*command)
        assert again.status == 0, again.stderr
        assert json.loads(again.stdout)["lanes"] == document["lanes"]
        assert json.loads(record.read_text()) == json.loads(again.stdout)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tokens", "1"], ["--tokens", "greater than or equal to 2"]),
        (["--context", "1"], ["--context", "greater than or equal to 2"]),
        (["--seed", "-1"], ["--seed", "greater than or equal to 0"]),
        (["--lane", "w8a8"], ["--lane", "w8a8", "w4a16"]),
        (["--dtype", "float16"], ["--dtype", "float16", "bfloat16"]),
        (["--memory", "lots"], ["--memory", "lots", "24GiB"]),
        (["--perplexity"], ["--perplexity"]),
    ],
)
def test_an_option_that_is_unknown_or_has_no_such_value_is_refused(
    options: list[str], words: list[str], good: Path, reference: Path, data: Path
):
    result = run("evaluate", good, "--reference", reference, "--data", data, *options)
    misused(result, *words)


@pytest.mark.parametrize("missing", ["--reference", "--data", "CHECKPOINT"])
def test_what_must_be_given_is_named(missing: str, good: Path, reference: Path, data: Path):
    given = {
        "CHECKPOINT": [good],
        "--reference": ["--reference", reference],
        "--data": ["--data", data],
    }
    arguments = [word for name, words in given.items() if name != missing for word in words]
    misused(run("evaluate", *arguments), "Missing", missing)
