"""The written checkpoint: every byte, name and figure that an engine or a user relies on."""

import fnmatch
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file

from fourge_process import Finished, contents, run, run_fresh, tensor_bytes_of
from random_checkpoint import published_config, write_checkpoint, write_input_ids
from random_values import cold_experts

NUM_EXPERTS, TOP_K, NUM_LAYERS = 8, 2, 4
SPARSE_LAYERS = (1, 3)
MTP_LAYER = NUM_LAYERS
# Dense layers that are no prefix; contexts of 48 tokens are longer than index_topk (32).
DRAWN = published_config(
    num_hidden_layers=NUM_LAYERS,
    mlp_layer_types=["dense", "sparse", "dense", "sparse"],
    n_routed_experts=NUM_EXPERTS,
)
# Which layers are dense stands in one key alone.
CONFIG = {key: value for key, value in DRAWN.items() if key != "first_k_dense_replace"}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
OTHER_FILES = {
    "tokenizer.json": b'{"version": "1.0"}\r\n',
    "generation_config.json": b'{"eos_token_id": [0, 1, 2]}',
    "chat_template.jinja": b"{{ messages }}\n",
    "README.md": b"",
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "figures/a b/loss curve \xc3\xa9 #1.bin".encode("latin-1").decode(): bytes(range(256)),
}
RECIPE = """
batch_tokens = 128
[[pass]]
name = "short"
data = ["short.jsonl"]
samples = 16
max_tokens = 20
[[pass]]
name = "long"
data = ["long.jsonl"]
samples = 16
max_tokens = 48
"""
TOKENS = {"short": 7 * 20, "long": 5 * 48}

Tensors = dict[str, torch.Tensor]


def load_all(folder: Path) -> Tensors:
    """Every tensor of a checkpoint, with the safetensors package."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def expert(layer: int, number: int, projection: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{number}.{projection}."


def succeed(result: Finished) -> Finished:
    assert result.status == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    write_input_ids(folder / "short.jsonl", sequences=7, length=20, vocab=256, seed=1)
    write_input_ids(folder / "long.jsonl", sequences=5, length=48, vocab=256, seed=2)
    (folder / "two.toml").write_text(RECIPE)
    return folder / "two.toml"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("source") / "model", config=DRAWN)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    for name, data in OTHER_FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def out(source: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made in a fresh interpreter; most other runs of this file are forks."""
    folder = tmp_path_factory.mktemp("out") / "made" / "here"
    succeed(run_fresh("quantize", source, folder, "--recipe", recipe))
    return folder


@pytest.fixture(scope="module")
def source_tensors(source: Path) -> Tensors:
    return load_all(source)


@pytest.fixture(scope="module")
def tensors(out: Path) -> Tensors:
    return load_all(out)


@pytest.fixture(scope="module")
def coverage(out: Path) -> dict[int, dict[str, Any]]:
    """Layer -> its entry of fourge/coverage.json."""
    document = json.loads((out / "fourge" / "coverage.json").read_text())
    return {entry["layer"]: entry for entry in document["layers"]}


# -- config.json, hf_quant_config.json ------------------------------------------------------------


def without_block(text: str) -> tuple[str, dict[str, Any]]:
    """A config's text with the member quantization_config cut out, and that member's value."""
    match = re.search(r',\s*"quantization_config"\s*:\s*', text)
    assert match is not None
    block, end = json.JSONDecoder().raw_decode(text, match.end())
    return text[: match.start()] + text[end:], block


def expected_exclusions(dense: list[int], mtp: list[int]) -> set[str]:
    """nvfp4-modelopt's recommended list, written out."""
    named = {f"model.layers.{layer}.*" for layer in dense + mtp}
    return {"lm_head", "*self_attn*", "*mlp.shared_experts*", "*shared_head*"} | named


def test_config_json_is_the_sources_bytes_plus_one_block(source: Path, out: Path) -> None:
    text = (out / "config.json").read_bytes().decode()

    rest, block = without_block(text)

    assert rest.encode() == (source / "config.json").read_bytes()
    scheme = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    groups = {"input_activations": scheme, "weights": scheme, "targets": ["Linear"]}
    assert block["quant_method"] == "modelopt"
    assert block["quant_algo"] == "NVFP4"
    assert block["group_size"] == 16
    assert block["config_groups"] == {"group_0": groups}
    assert set(block["producer"]) == {"name", "version"}
    assert "kv_cache_scheme" not in block
    assert json.loads(text) == {**CONFIG, "quantization_config": block}


STYLES = {
    "indent 4": json.dumps(CONFIG, indent=4) + "\n",
    "tabs, no newline at the end": json.dumps(CONFIG, indent="\t"),
    "one line": json.dumps(CONFIG),
    "one line, no spaces": json.dumps(CONFIG, separators=(",", ":")),
    "blanks within the braces": "{ " + json.dumps(CONFIG)[1:-1] + " }\n",
    "blank lines at the end": json.dumps(CONFIG, indent=2)[:-2] + "\n\n}\n\n",
    "CR LF": (json.dumps(CONFIG, indent=2) + "\n").replace("\n", "\r\n"),
    "reversed keys, escapes and accents": json.dumps(
        {"note": 'a \\ "b" \u00e9 }', **dict(reversed(CONFIG.items()))}, indent=2
    ),
}


@pytest.mark.parametrize("style", STYLES)
def test_config_json_keeps_its_style_whatever_that_is(
    style: str, source: Path, recipe: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(source, tmp_path / "model")
    (model / "config.json").write_bytes(STYLES[style].encode())

    succeed(run("quantize", model, tmp_path / "out", "--recipe", recipe))

    text = (tmp_path / "out" / "config.json").read_bytes().decode()
    rest, block = without_block(text)
    assert rest.encode() == STYLES[style].encode()
    assert json.loads(text)["quantization_config"] == block


def test_both_metadata_files_carry_the_recommended_exclusions(out: Path) -> None:
    document = json.loads((out / "hf_quant_config.json").read_text())
    flat = json.loads((out / "config.json").read_text())["quantization_config"]
    excluded = document["quantization"].pop("exclude_modules")

    assert document["quantization"] == {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
    }
    assert document["producer"] == flat["producer"]
    assert excluded == flat["ignore"]
    assert len(excluded) == len(set(excluded))
    assert set(excluded) == expected_exclusions([0, 2], [MTP_LAYER])


def test_excluding_dense_layer_1_leaves_layers_10_to_12_quantized(
    recipe: Path, tmp_path: Path
) -> None:
    config = published_config(num_hidden_layers=13, first_k_dense_replace=2)
    write_checkpoint(tmp_path / "model", config=config)

    succeed(run("quantize", tmp_path / "model", tmp_path / "out", "--recipe", recipe))

    entries = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    excluded = entries["quantization"]["exclude_modules"]
    assert set(excluded) == expected_exclusions([0, 1], [13])
    for layer in range(14):
        experts = f"model.layers.{layer}.mlp.experts"
        # vllm's rule: an entry within the name, or a pattern that fits it.
        hit = any(entry in experts or fnmatch.fnmatch(experts, entry) for entry in excluded)
        assert hit == (layer in (0, 1, 13))
    written = load_all(tmp_path / "out")
    assert written[expert(12, 0, "gate_proj") + "weight"].dtype == torch.uint8


# -- what stays as it is --------------------------------------------------------------------------


def test_every_other_file_of_the_source_is_there_byte_for_byte(source: Path, out: Path) -> None:
    for name in OTHER_FILES:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name


def test_the_output_holds_nothing_that_was_not_announced(out: Path) -> None:
    index = json.loads((out / "model.safetensors.index.json").read_text())
    announced = {
        "config.json",
        "hf_quant_config.json",
        "model.safetensors.index.json",
        *index["weight_map"].values(),
        *OTHER_FILES,
    }
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}

    assert {name for name in files if not name.startswith("fourge/")} == announced
    assert {"fourge/run.json", "fourge/coverage.json"} <= files
    assert not any("work" in name or "partial" in name for name in contents(out))


def test_every_tensor_but_routed_experts_keeps_its_bytes(
    source_tensors: Tensors, tensors: Tensors
) -> None:
    kept = [
        name
        for name in source_tensors
        if ".mlp.experts." not in name or name.startswith(f"model.layers.{MTP_LAYER}.")
    ]
    for name in kept:
        assert tensors[name].dtype == source_tensors[name].dtype, name
        assert tensors[name].shape == source_tensors[name].shape, name
        assert bits(tensors[name]) == bits(source_tensors[name]), name
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    num_quantized = len(SPARSE_LAYERS) * NUM_EXPERTS * len(PROJECTIONS)
    assert len(tensors) == len(kept) + 4 * num_quantized
    assert len(source_tensors) == len(kept) + num_quantized


def test_dropping_the_mtp_layer_takes_its_tensors_and_says_so(
    source: Path, recipe: Path, tmp_path: Path, tensors: Tensors
) -> None:
    out = tmp_path / "out"
    succeed(run("quantize", source, out, "--recipe", recipe, "--mtp", "drop"))

    dropped = load_all(out)
    layer = f"model.layers.{MTP_LAYER}."
    assert set(dropped) == {name for name in tensors if not name.startswith(layer)}
    rest, block = without_block((out / "config.json").read_bytes().decode())
    original = (source / "config.json").read_bytes().decode()
    key = '"num_nextn_predict_layers": '
    assert rest == original.replace(key + "1", key + "0") != original
    assert set(block["ignore"]) == expected_exclusions([0, 2], [])
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(dropped)


# -- the quantized experts ------------------------------------------------------------------------


def nvfp4_by_the_book(weight: torch.Tensor, amax: float) -> tuple[bytes, bytes, np.float32]:
    """Codes, scales and weight_scale_2 step by step; written without a look at fourge's own."""
    w = weight.float().numpy()
    scale_2 = np.float32(amax) / np.float32(2688) if amax else np.float32(1) / np.float32(2688)
    blocks = w.reshape(w.shape[0], -1, 16)
    scales = np.abs(blocks).max(axis=2) / (np.float32(6) * scale_2)
    scales[scales == 0] = 1
    stored = torch.from_numpy(scales.clip(2**-9, 448)).to(torch.float8_e4m3fn)
    x = blocks / (stored.float().numpy() * scale_2)[:, :, None]
    magnitude = np.abs(x)
    index = sum((magnitude > low).astype(np.uint8) for low in (0.25, 1.25, 2.5, 5.0)) + sum(
        (magnitude >= low).astype(np.uint8) for low in (0.75, 1.75, 3.5)
    )
    codes = (index | (x < 0).astype(np.uint8) << 3).reshape(w.shape)
    return (codes[:, 1::2] << 4 | codes[:, ::2]).tobytes(), bits(stored), scale_2


@pytest.mark.parametrize("layer", SPARSE_LAYERS)
def test_every_projection_has_the_bytes_of_the_published_arithmetic(
    layer: int, source_tensors: Tensors, tensors: Tensors
) -> None:
    for number in range(NUM_EXPERTS):
        gate, up, down = (
            source_tensors[expert(layer, number, projection) + "weight"]
            for projection in PROJECTIONS
        )
        gate_up_amax = max(gate.abs().max().item(), up.abs().max().item())
        amaxes = (gate_up_amax, gate_up_amax, down.abs().max().item())
        for projection, weight, amax in zip(PROJECTIONS, (gate, up, down), amaxes, strict=True):
            name = expert(layer, number, projection)
            codes, scales, scale_2 = nvfp4_by_the_book(weight, amax)
            rows, columns = weight.shape
            assert tensors[name + "weight"].dtype == torch.uint8
            assert tensors[name + "weight"].shape == (rows, columns // 2)
            assert tensors[name + "weight_scale"].dtype == torch.float8_e4m3fn
            assert tensors[name + "weight_scale"].shape == (rows, columns // 16)
            assert tensors[name + "weight_scale_2"].shape == ()
            assert bits(tensors[name + "weight"]) == codes, name
            assert bits(tensors[name + "weight_scale"]) == scales, name
            assert bits(tensors[name + "weight_scale_2"]) == scale_2.tobytes(), name


def test_every_scale_is_finite_and_positive(tensors: Tensors) -> None:
    scales = {name: tensor for name, tensor in tensors.items() if "_scale" in name}

    assert len(scales) == 3 * len(SPARSE_LAYERS) * NUM_EXPERTS * len(PROJECTIONS)
    for name, scale in scales.items():
        values = scale.float()
        assert torch.isfinite(values).all(), name
        assert (values > 0).all(), name


@pytest.mark.parametrize(
    ("number", "projection"), [(1, "gate_proj"), (1, "up_proj"), (2, "down_proj")]
)
def test_an_all_zero_projection_gets_zero_codes_and_harmless_scales(
    number: int, projection: str, tensors: Tensors, source_tensors: Tensors
) -> None:
    for layer in SPARSE_LAYERS:
        name = expert(layer, number, projection)
        assert not source_tensors[name + "weight"].any()
        assert not tensors[name + "weight"].any()
        assert set(bits(tensors[name + "weight_scale"])) == {0x38}
        assert 0 < tensors[name + "weight_scale_2"].item() < 1


def test_all_experts_of_a_layer_share_its_largest_input_scale(
    tensors: Tensors, coverage: dict[int, dict[str, Any]]
) -> None:
    for layer in SPARSE_LAYERS:
        passes = coverage[layer]["passes"]
        amax = {
            kind: max(max(figures[kind]) for figures in passes.values())
            for kind in ("gate_up_amax", "down_amax")
        }
        assert amax["gate_up_amax"] != amax["down_amax"]
        for projection in PROJECTIONS:
            kind = "down_amax" if projection == "down_proj" else "gate_up_amax"
            expected = np.float32(amax[kind]) / np.float32(2688)
            for number in range(NUM_EXPERTS):
                scale = tensors[expert(layer, number, projection) + "input_scale"]
                assert scale.dtype == torch.float32
                assert scale.shape == ()
                assert scale.item() == expected


# -- coverage -------------------------------------------------------------------------------------


def test_experts_that_saw_no_token_are_listed(coverage: dict[int, dict[str, Any]]) -> None:
    assert set(coverage) == set(SPARSE_LAYERS)
    for layer in SPARSE_LAYERS:
        totals = np.sum([one["tokens"] for one in coverage[layer]["passes"].values()], axis=0)
        never = np.flatnonzero(totals == 0).tolist()
        assert coverage[layer]["never_seen"] == never
        assert set(cold_experts(NUM_EXPERTS)) <= set(never)
        assert len(never) < NUM_EXPERTS


def test_each_pass_routes_each_token_to_top_k_experts(
    coverage: dict[int, dict[str, Any]],
) -> None:
    for layer in SPARSE_LAYERS:
        for name, tokens in TOKENS.items():
            figures = coverage[layer]["passes"][name]
            assert len(figures["tokens"]) == NUM_EXPERTS
            assert sum(figures["tokens"]) == tokens * TOP_K
            seen = [count > 0 for count in figures["tokens"]]
            assert [amax > 0 for amax in figures["gate_up_amax"]] == seen
            # Expert 1's gate and up are zero, and so is the input of its down_proj.
            expected = [here and number != 1 for number, here in enumerate(seen)]
            assert [amax > 0 for amax in figures["down_amax"]] == expected


def test_second_moments_agree_with_the_largest_input(
    out: Path, coverage: dict[int, dict[str, Any]]
) -> None:
    record = json.loads((out / "fourge" / "run.json").read_text())
    files = [load_file(out / name) for name in record["statistics"]]

    assert len(files) == len(SPARSE_LAYERS)
    for layer, statistics in zip(SPARSE_LAYERS, files, strict=True):
        for position, name in enumerate(TOKENS):
            figures = coverage[layer]["passes"][name]
            tokens = torch.tensor(figures["tokens"])
            for kind, width in (("gate_up", 64), ("down", 32)):
                square_sum = statistics[f"{kind}_square_sum"][position]
                peak = torch.tensor(figures[f"{kind}_amax"]).square()
                largest = square_sum.max(dim=1).values
                assert square_sum.shape == (NUM_EXPERTS, width)
                # The channel that holds the largest value adds up to that square at least.
                assert (largest >= peak * (1 - 1e-5)).all()
                assert (largest <= tokens * peak * (1 + 1e-5)).all()


def counts_with(folder: Path, source: Path, *files: Path) -> dict[int, np.ndarray]:
    """Layer -> tokens per expert of one pass over ``files``."""
    out = folder / "-".join(path.stem for path in files)
    data = [word for path in files for word in ("--data", path)]
    succeed(run("quantize", source, out, *data))
    document = json.loads((out / "fourge" / "coverage.json").read_text())
    return {
        entry["layer"]: np.array(entry["passes"]["data"]["tokens"]) for entry in document["layers"]
    }


def test_sequences_packed_together_do_not_see_each_other(source: Path, tmp_path: Path) -> None:
    short = write_input_ids(tmp_path / "a.jsonl", sequences=1, length=9, vocab=256, seed=5)
    long = write_input_ids(tmp_path / "b.jsonl", sequences=1, length=57, vocab=256, seed=6)

    alone = [counts_with(tmp_path, source, path) for path in (short, long)]
    together = counts_with(tmp_path, source, short, long)

    for layer in SPARSE_LAYERS:
        assert alone[0][layer].sum() == 9 * TOP_K
        assert (together[layer] == alone[0][layer] + alone[1][layer]).all()


# -- the same bytes by other ways -----------------------------------------------------------------


def weights_and_figures(folder: Path) -> dict[str, str]:
    """Hashes of everything that does not record how the source was cut and what was allowed."""
    return {name: digest for name, digest in contents(folder).items() if "run.json" not in name}


@pytest.mark.parametrize("num_shards", [1, 2, 7])
def test_an_odd_split_of_the_source_gives_the_same_bytes(
    num_shards: int, source: Path, recipe: Path, out: Path, tmp_path: Path
) -> None:
    model = write_checkpoint(tmp_path / "model", config=DRAWN, num_shards=num_shards)
    shutil.copytree(
        source, model, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*")
    )

    succeed(run("quantize", model, tmp_path / "out", "--recipe", recipe))

    assert weights_and_figures(tmp_path / "out") == weights_and_figures(out)


def test_a_fused_source_gives_the_same_bytes(
    source: Path, recipe: Path, out: Path, tmp_path: Path
) -> None:
    model = write_checkpoint(tmp_path / "model", config=DRAWN, num_shards=3, fused_experts=True)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_all(model)
    shutil.copytree(
        source, model, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*")
    )

    succeed(run("quantize", model, tmp_path / "out", "--recipe", recipe))

    made, expected = weights_and_figures(tmp_path / "out"), weights_and_figures(out)
    # The BF16 MTP layer stays as the source has it, fused or not.
    differing = {name for name in expected if made.get(name) != expected[name]}
    assert differing <= {name for name in expected if name.startswith("model")}
    fused, split = load_all(tmp_path / "out"), load_all(out)
    mtp = f"model.layers.{MTP_LAYER}."
    assert {n: bits(t) for n, t in fused.items() if not n.startswith(mtp)} == {
        n: bits(t) for n, t in split.items() if not n.startswith(mtp)
    }


def test_a_download_cache_of_links_gives_files(
    source: Path, recipe: Path, out: Path, tmp_path: Path
) -> None:
    """As huggingface_hub lays out a snapshot: every file a link to a blob."""
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blobs / str(number))
        link.symlink_to(blobs / str(number))

    succeed(run("quantize", snapshot, tmp_path / "out", "--recipe", recipe))

    assert weights_and_figures(tmp_path / "out") == weights_and_figures(out)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_source_in_a_single_file_gives_the_same_bytes(
    source: Path, recipe: Path, out: Path, tmp_path: Path
) -> None:
    model = write_checkpoint(tmp_path / "model", config=DRAWN, num_shards=1)
    shutil.copytree(
        source, model, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*")
    )
    (model / "model-00001-of-00001.safetensors").rename(model / "model.safetensors")
    (model / "model.safetensors.index.json").unlink()

    succeed(run("quantize", model, tmp_path / "out", "--recipe", recipe))

    assert weights_and_figures(tmp_path / "out") == weights_and_figures(out)


def test_a_tight_budget_cuts_layers_into_groups_and_gives_the_same_bytes(
    tmp_path: Path, recipe: Path
) -> None:
    config = published_config(
        num_hidden_layers=2, hidden_size=256, moe_intermediate_size=256, n_routed_experts=80
    )
    model = write_checkpoint(tmp_path / "model", config=config)
    refused = run("quantize", model, tmp_path / "refused", "--recipe", recipe, "--memory", "300MiB")
    assert refused.status == 2
    smallest = re.search(r"--memory ([\d.]+)(MiB|GiB)", refused.stderr)
    assert smallest is not None, refused.stderr
    megabytes = float(smallest[1]) * (1024 if smallest[2] == "GiB" else 1)

    groups = {}
    # Resident memory at the start differs by some MiB from run to run; an expert has 0.4 MiB.
    for name, memory in {"tight": megabytes + 2, "wide": megabytes + 1000}.items():
        out = tmp_path / name
        limit = f"{memory:.1f}MiB"
        succeed(run("quantize", model, out, "--recipe", recipe, "--memory", limit))
        record = json.loads((out / "fourge" / "run.json").read_text())
        groups[name] = record["timing"]["groups_per_layer"]

    assert groups["wide"] == 1
    assert groups["tight"] > 2
    assert weights_and_figures(tmp_path / "tight") == weights_and_figures(tmp_path / "wide")


# -- the index, and other readers -----------------------------------------------------------------


def test_the_index_names_every_tensor_and_adds_up(out: Path, tensors: Tensors) -> None:
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(out.glob("*.safetensors"))

    assert index["metadata"]["total_size"] == sum(map(tensor_bytes_of, shards))
    assert set(index["weight_map"]) == set(tensors)
    for number, path in enumerate(shards, start=1):
        assert path.name == f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with safetensors.safe_open(path, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            named = {name for name, file in index["weight_map"].items() if file == path.name}
            assert set(shard.keys()) == named


def test_the_example_model_keeps_its_tokenizer_and_template(tiny_glm: Path, tmp_path: Path) -> None:
    conversations = tiny_glm.parent / "conversations" / "broad.jsonl"
    lines = conversations.read_bytes().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_bytes(b"".join(lines[:3]))

    data = ("--data", tmp_path / "few.jsonl")
    succeed(run("quantize", tiny_glm, tmp_path / "out", "--method", "max", *data))

    copied = [
        path
        for path in sorted(tiny_glm.iterdir())
        if path.suffix != ".safetensors"
        and path.name not in ("config.json", "model.safetensors.index.json")
    ]
    assert len(copied) >= 4
    for path in copied:
        there = hashlib.sha256((tmp_path / "out" / path.name).read_bytes()).digest()
        assert there == hashlib.sha256(path.read_bytes()).digest(), path.name
    coverage = json.loads((tmp_path / "out" / "fourge" / "coverage.json").read_text())
    run_record = json.loads((tmp_path / "out" / "fourge" / "run.json").read_text())
    config = json.loads((tiny_glm / "config.json").read_text())
    routed = run_record["data"]["tokens"] * config["num_experts_per_tok"]
    assert run_record["data"]["sequences"] == 3
    for entry in coverage["layers"]:
        assert sum(entry["passes"]["data"]["tokens"]) == routed


def test_errors_of_the_doctor_fail_the_run_and_every_run_after_it(tmp_path: Path):
    """The output is there, and so is the word on it: SGLang takes one MTP layer alone."""
    config = published_config(num_nextn_predict_layers=2)
    source = write_checkpoint(tmp_path / "source", config=config)
    data = write_input_ids(tmp_path / "ids.jsonl", sequences=2, length=40, vocab=256)
    for _ in range(2):
        done = run("quantize", source, tmp_path / "out", "--data", data, "--json")
        assert done.status == 1
        assert "the doctor found errors" in done.stderr
        (finding,) = json.loads(done.stdout)["doctor"]
        assert (finding["rule"], finding["severity"]) == ("M10", "error")
        assert finding["message"] in done.stderr
    examined = run("doctor", tmp_path / "out", "--json")
    assert examined.status == 1
    kept = json.loads((tmp_path / "out" / "fourge" / "doctor.json").read_text())
    assert kept["findings"] == json.loads(examined.stdout)["findings"]
