"""Rules C and X: each accident of config.json fires its rule and no other."""

import codecs
from collections.abc import Callable
from typing import Any

import pytest
import torch

from checkpoint_edits import Folder, expert, rules_of
from damage import Case
from random_checkpoint import published_config

INDEXER = "self_attn.indexer."
# Layers 0, 1, 2 and 6 full, 3, 4 and 5 shared; and the same said in two keys.
FREQ = published_config(num_hidden_layers=7, index_topk_freq=4, index_skip_topk_offset=3)
BOTH = published_config(
    num_hidden_layers=5,
    indexer_types=["full", "shared", "full", "full", "shared"],
    index_topk_pattern="FSFFS",
)


def drop_experts_from(folder: Folder, number: int) -> None:
    """A pruned model whose config was left as it was."""
    folder.drop(*(f".experts.{e}." for e in range(number, 6)))
    folder.map("mlp.gate.weight", lambda t: t[:number])
    folder.map("e_score_correction_bias", lambda t: t[:number])


DAMAGE: dict[str, tuple[list[str], Callable[[Folder], object]]] = {
    "no config": (["C06"], lambda f: (f.path / "config.json").unlink()),
    "broken config": (["C06"], lambda f: (f.path / "config.json").write_text("{,}")),
    "config is a list": (["C06"], lambda f: f.write("config.json", [])),
    "config with a byte order mark": (
        ["C06"],
        lambda f: (f.path / "config.json").write_bytes(
            codecs.BOM_UTF8 + (f.path / "config.json").read_bytes()
        ),
    ),
    "a key twice": (
        ["C06"],
        lambda f: (f.path / "config.json").write_text(
            (f.path / "config.json").read_text().replace(
                '"scoring_func"', '"scoring_func": "softmax", "scoring_func"'
            )
        ),
    ),
    "missing dimension": (["C06"], lambda f: f.config(kv_lora_rank=None)),
    "unknown activation": (["C06"], lambda f: f.config(hidden_act="gelu")),
    "stale rope_scaling": (
        ["C01"],
        lambda f: f.config(rope_scaling={"type": "yarn", "factor": 4.0,
                                         "original_max_position_embeddings": 1024}),
    ),
    "two rope bases": (["C01"], lambda f: f.config(rope_theta=1000000)),
    "rope of another generation": (
        ["C01"],
        lambda f: f.config(rope_parameters={"rope_theta": 1000000, "rope_type": "default"},
                           max_position_embeddings=1048576),
    ),
    "no topk_method": (["C02"], lambda f: f.config(topk_method=None)),
    "no scoring_func": (["C02"], lambda f: f.config(scoring_func=None)),
    "softmax": (["C02"], lambda f: f.config(scoring_func="softmax")),
    "no n_group": (["C02"], lambda f: f.config(n_group=None)),
    "no scaling factor": (["C02"], lambda f: f.config(routed_scaling_factor=None)),
    "no norm_topk_prob": (["C02"], lambda f: f.config(norm_topk_prob=None)),
    "norm_topk_prob off": (["C02"], lambda f: f.config(norm_topk_prob=False)),
    "scaling factor of nobody": (["C02"], lambda f: f.config(routed_scaling_factor=1.0)),
    "two routing keys": (["C02"], lambda f: f.config(scoring_func=None, topk_method=None)),
    "too many dense layers": (["C03"], lambda f: f.config(first_k_dense_replace=2)),
    "no dense layers": (["C03"], lambda f: f.config(first_k_dense_replace=0)),
    "wrong mlp_layer_types": (
        ["C03"], lambda f: f.config(mlp_layer_types=["dense", "dense", "sparse"])
    ),
    "short mlp_layer_types": (["C03"], lambda f: f.config(mlp_layer_types=["dense", "sparse"])),
    "both keys wrong": (
        ["C03"],
        lambda f: f.config(mlp_layer_types=["sparse"] * 3, first_k_dense_replace=0),
    ),
    "more experts announced": (["C04"], lambda f: drop_experts_from(f, 5)),
    "fewer experts announced": (["C04"], lambda f: f.config(n_routed_experts=5)),
    "an expert too many": (
        ["C04"],
        lambda f: f.put({
            name.replace("experts.0.", "experts.6."): f.load(name) for name in f.names(expert(1, 0))
        }),
    ),
    "model_type rewritten": (["C05"], lambda f: f.config(model_type="deepseek_v32")),
    "model_type of a draft": (["C05"], lambda f: f.config(model_type="deepseek_mtp")),
    "architectures rewritten": (
        ["C05"], lambda f: f.config(architectures=["DeepseekV32ForCausalLM"])
    ),
    "both rewritten": (
        ["C05"],
        lambda f: f.config(model_type="deepseek_v32", architectures=["DeepseekV32ForCausalLM"]),
    ),
    "written anew by transformers": (
        ["C06"],
        lambda f: f.config(layer_types=["indexed_attention"] * 3, head_dim=8,
                           indexer_types=["full"] * 3),
    ),
    "vocabulary": (["C09"], lambda f: f.config(vocab_size=320)),
    "short lm_head": (["C09"], lambda f: f.map("lm_head.weight", lambda t: t[:-8])),
    "head_dim": (["C10"], lambda f: f.config(head_dim=192)),
    "eps": (["C12"], lambda f: f.config(rms_norm_eps=1e-6)),
    "a layer too many": (["C12"], lambda f: f.config(num_hidden_layers=4)),
    "a layer too few": (["C12"], lambda f: f.config(num_hidden_layers=2)),
    "no indexer in a layer": (["X01"], lambda f: f.drop("layers.1." + INDEXER)),
    "no indexer in the MTP layer": (["X01"], lambda f: f.drop("layers.3." + INDEXER)),
    "half an indexer": (["X01"], lambda f: f.drop("layers.1." + INDEXER + "wk.weight")),
    "readers differ": (
        ["X02"],
        lambda f: f.config(indexer_types=["full"] * 3, index_topk_pattern="FSF"),
    ),
    "short pattern": (["X03"], lambda f: f.config(index_topk_pattern="FF")),
    "long pattern": (["X03"], lambda f: f.config(index_topk_pattern="FFFS")),
    "strange letter": (["X03"], lambda f: f.config(index_topk_pattern="FXF")),
    "pattern begins with S": (["X03"], lambda f: f.config(index_topk_pattern="SFF")),
    "pattern is a number": (["X03"], lambda f: f.config(index_topk_pattern=3)),
    "short indexer_types": (["X03"], lambda f: f.config(indexer_types=["full"])),
    "indexer_types alone": (
        ["X04"], lambda f: f.config(indexer_types=["full", "shared", "full"])
    ),
    "pattern over trained indexers": (["X05"], lambda f: f.config(index_topk_pattern="FSF")),
    "freq over trained indexers": (["X05"], lambda f: f.config(index_topk_freq=2)),
    "no interleave": (["X07"], lambda f: f.config(indexer_rope_interleave=None)),
    "interleave off": (["X07"], lambda f: f.config(indexer_rope_interleave=False)),
    "no key bias": (["X09"], lambda f: f.drop("layers.1." + INDEXER + "k_norm.bias")),
    "FP8 keys": (
        ["X09"], lambda f: f.map("layers.1." + INDEXER + "wk.", lambda t: t.to(torch.float8_e4m3fn))
    ),
    "packed query": (
        ["X10"], lambda f: f.put(f.pack("model.layers.1." + INDEXER + "wq_b.weight"))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_an_accident_fires_its_rule(own: Case, name: str):
    wanted, damage = DAMAGE[name]
    damage(Folder(own.checkpoint))
    assert rules_of(own.checkpoint) == wanted


SHARING: dict[str, tuple[dict[str, Any], list[str], Callable[[Folder], object]]] = {
    "lost freq": (FREQ, ["X01"], lambda f: f.config(index_topk_freq=None)),
    "other offset": (FREQ, ["X01"], lambda f: f.config(index_skip_topk_offset=2)),
    "lost indexer": (FREQ, ["X01"], lambda f: f.drop("layers.6." + INDEXER)),
    "another model's pattern": (FREQ, ["X06"], lambda f: f.config(index_topk_pattern="FFSFSFS")),
    "pattern beside types and freq": (
        FREQ,
        ["X06"],
        lambda f: f.config(
            indexer_types=["full"] * 3 + ["shared"] * 3 + ["full"], index_topk_pattern="FFSFSFS"
        ),
    ),
    "types say otherwise": (FREQ, ["X02"], lambda f: f.config(indexer_types=["full"] * 7)),
    "no sharing in drafts": (
        FREQ, ["M11"], lambda f: f.config(index_share_for_mtp_iteration=False)
    ),
    "lost pattern": (BOTH, ["X04"], lambda f: f.config(index_topk_pattern=None)),
    "pattern and types differ": (BOTH, ["X02"], lambda f: f.config(index_topk_pattern="FSFFF")),
    "spare indexer": (
        BOTH,
        ["X01"],
        lambda f: f.put({
            name.replace("layers.2.", "layers.1."): f.load(name)
            for name in f.names("layers.2." + INDEXER)
        }),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARING)
def test_an_accident_of_a_sharing_model_fires_its_rule(
    make_case: Callable[..., Case], tmp_path: Any, name: str
):
    config, wanted, damage = SHARING[name]
    own = make_case("glm_moe_dsa", config=config).copy(tmp_path)
    damage(Folder(own.checkpoint))
    assert rules_of(own.checkpoint) == wanted
