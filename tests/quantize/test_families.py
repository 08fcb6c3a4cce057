"""Every family and variant goes through: experts NVFP4, everything else as it was."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fourge.checkpoint.names import Role, parse
from fourge.formats import nvfp4
from fourge_process import run
from random_checkpoint import FAMILIES, published_config, write_checkpoint, write_input_ids

SEQUENCES, LENGTH = 3, 70
VARIANTS = {
    **{family: published_config(family) for family in FAMILIES},
    "queries without a latent": published_config("glm4_moe_lite", q_lora_rank=None),
    "shared indexers": published_config(
        num_hidden_layers=5, index_topk_freq=2, index_skip_topk_offset=2
    ),
    "expert groups": published_config("deepseek_v3", n_group=3, topk_group=2),
    "two MTP layers": published_config(num_nextn_predict_layers=2),
    "no MTP layer": published_config(num_nextn_predict_layers=0),
    "tied embeddings": published_config(tie_word_embeddings=True),
    "no shared experts": published_config(n_shared_experts=0),
}

# What the doctor finds in the output, since it is so in the source: SGLang wants one MTP layer.
ERRORS = {"two MTP layers": ["M10"]}


def load(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


@pytest.mark.parametrize("name", VARIANTS)
def test_experts_are_quantized_and_nothing_else(name: str, tmp_path: Path):
    config = VARIANTS[name]
    source = write_checkpoint(tmp_path / "source", config=config)
    data = write_input_ids(
        tmp_path / "ids.jsonl", sequences=SEQUENCES, length=LENGTH, vocab=config["vocab_size"]
    )
    done = run("quantize", source, tmp_path / "out", "--method", "max", "--data", data)
    record = json.loads((tmp_path / "out" / "fourge" / "run.json").read_text())
    errors = [one["rule"] for one in record["doctor"] if one["severity"] == "error"]
    assert errors == ERRORS.get(name, []), done.stderr
    assert done.status == (1 if errors else 0), done.stderr

    given, made = load(source), load(tmp_path / "out")
    mtp = range(config["num_hidden_layers"], 99)
    for tensor, value in given.items():
        parsed = parse(tensor)
        if parsed.role != Role.ROUTED_EXPERT or parsed.layer in mtp:
            assert torch.equal(made.pop(tensor), value), tensor
            continue
        stem = tensor.removesuffix("weight")
        parts = [made.pop(stem + part) for part in ("weight", "weight_scale", "weight_scale_2")]
        again = nvfp4.quantize(value, parts[2])
        assert torch.equal(again.weight, parts[0]), tensor
        assert torch.equal(again.weight_scale.view(torch.uint8), parts[1].view(torch.uint8)), tensor
        assert 0 < float(made.pop(stem + "input_scale")) < 1e3
    assert made == {}

    coverage = json.loads((tmp_path / "out" / "fourge" / "coverage.json").read_text())
    for layer in coverage["layers"]:
        tokens = layer["passes"]["data"]["tokens"]
        assert sum(tokens) == SEQUENCES * LENGTH * config["num_experts_per_tok"]
