from typing import Any

import pytest
import transformers

from fourge.errors import ConfigError
from fourge.models.config import from_dict
from hollow_checkpoint import GLM_5_1 as PUBLISHED_GLM_5_1

Raw = dict[str, Any]

GLM_5_1: Raw = dict(PUBLISHED_GLM_5_1)
GLM_5_2: Raw = GLM_5_1 | {
    "head_dim": 192,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "index_topk_pattern": None,
    "indexer_types": ["full"] * 3 + (["shared"] * 3 + ["full"]) * 18 + ["shared"] * 3,
    "index_share_for_mtp_iteration": True,
    "moe_router_dtype": "float32",
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    "max_position_embeddings": 1048576,
}
GLM_4_7_FLASH: Raw = {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "pad_token_id": 154820,
    "eos_token_id": [154820, 154827, 154829],
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "max_position_embeddings": 202752,
    "model_type": "glm4_moe_lite",
    "moe_intermediate_size": 1536,
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "num_attention_heads": 20,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.8,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 47,
    "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 1.0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "transformers_version": "5.0.0rc0",
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "vocab_size": 154880,
}
DEEPSEEK_V3: Raw = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8"},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
DEEPSEEK_V32: Raw = DEEPSEEK_V3 | {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
}
PUBLISHED = {
    "GLM-5.1": GLM_5_1,
    "GLM-5.2": GLM_5_2,
    "GLM-4.7-Flash": GLM_4_7_FLASH,
    "DeepSeek-V3": DEEPSEEK_V3,
    "DeepSeek-V3.2": DEEPSEEK_V32,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_has_no_unknown_key(name: str) -> None:
    assert from_dict(PUBLISHED[name]).unknown_keys == ()


@pytest.mark.parametrize(
    "config_class",
    [
        transformers.GlmMoeDsaConfig,
        transformers.Glm4MoeLiteConfig,
        transformers.DeepseekV3Config,
        transformers.DeepseekV32Config,
    ],
)
def test_a_config_saved_by_transformers_has_no_unknown_key(config_class: Any) -> None:
    raw = config_class().to_dict()
    config = from_dict(raw)
    assert config.unknown_keys == ()
    assert config.hidden_size == raw["hidden_size"]
    assert config.rope.theta == 10000.0


def test_glm_5_1_is_read_as_its_reference_says() -> None:
    config = from_dict(GLM_5_1)
    assert config.mlp_types == ("dense",) * 3 + ("sparse",) * 75
    assert config.indexer_types == ("full",) * 78
    assert (config.index_topk, config.index_n_heads, config.index_head_dim) == (2048, 32, 128)
    assert config.indexer_rope_interleave
    assert config.rope_interleave
    assert config.qk_head_dim == 256
    assert config.q_lora_rank == 2048
    assert config.rope.theta == 1e6
    assert config.rope.rope_type == "default"
    assert config.rms_norm_eps == 1e-5


def test_the_mtp_layer_follows_the_decoder_layers_and_is_sparse_with_an_indexer() -> None:
    config = from_dict(GLM_5_2)
    assert list(config.mtp_layers) == [78]
    assert config.is_sparse(78)
    assert config.has_indexer(78)
    assert not config.has_indexer(77)
    assert config.has_indexer(74)
    assert not config.is_sparse(2)
    assert config.is_sparse(3)


def test_no_mtp_layer_is_assumed_where_the_key_is_missing() -> None:
    raw = {key: GLM_5_1[key] for key in GLM_5_1 if key != "num_nextn_predict_layers"}
    assert list(from_dict(raw).mtp_layers) == []


def test_drafts_share_a_selection_where_the_config_says_so() -> None:
    assert from_dict(GLM_5_2).index_share_for_mtp_iteration
    assert not from_dict(GLM_5_1).index_share_for_mtp_iteration
    assert not from_dict(GLM_4_7_FLASH).index_share_for_mtp_iteration
    with pytest.raises(ConfigError, match="index_share_for_mtp_iteration"):
        from_dict(GLM_5_2 | {"index_share_for_mtp_iteration": "yes"})


def test_a_family_without_dsa_has_no_indexer_anywhere() -> None:
    config = from_dict(DEEPSEEK_V3)
    assert not config.uses_dsa
    assert config.indexer_types == ()
    assert config.index_topk == 0
    assert not config.has_indexer(5)
    assert not config.has_indexer(61)


@pytest.mark.parametrize("raw", [GLM_5_1, DEEPSEEK_V32], ids=["glm_moe_dsa", "deepseek_v32"])
def test_the_indexer_rotates_half_split_where_the_key_is_missing(raw: Raw) -> None:
    raw = {key: raw[key] for key in raw if key != "indexer_rope_interleave"}
    assert not from_dict(raw).indexer_rope_interleave


def test_an_unknown_key_is_reported_by_name(raw_config: Raw) -> None:
    config = from_dict(raw_config | {"zeta": 1, "attention_sink": True})
    assert config.unknown_keys == ("attention_sink", "zeta")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("moe_layer_freq", 2),
        ("moe_router_dtype", "bfloat16"),
        ("partial_rotary_factor", 0.5),
        ("layer_types", ["sliding_attention"] * 4),
        ("num_key_value_heads", 2),
        ("qk_head_dim", 99),
        ("num_local_experts", 9),
        ("n_group", 3),
        ("n_group", 8),
        ("topk_group", 2),
        ("num_experts_per_tok", 9),
        ("qk_rope_head_dim", 7),
        ("index_head_dim", 4),
        ("q_lora_rank", None),
        ("hidden_size", True),
        ("hidden_size", 64.0),
        ("hidden_size", 0),
        ("num_hidden_layers", "4"),
        ("rms_norm_eps", float("nan")),
        ("routed_scaling_factor", 0),
        ("norm_topk_prob", 1),
        ("n_shared_experts", -1),
        ("num_nextn_predict_layers", -1),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1]}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "type": "yarn"}),
        ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("rope_parameters", {"rope_type": "default"}),
        ("rope_parameters", [1]),
        ("rope_scaling", {"type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
        ("rope_theta", 5e4),
    ],
)
def test_a_value_that_is_not_computed_here_is_refused(
    raw_config: Raw, key: str, value: object
) -> None:
    with pytest.raises(ConfigError, match="needed is"):
        from_dict(raw_config | {key: value})


@pytest.mark.parametrize(
    "key",
    ["hidden_size", "q_lora_rank", "n_group", "norm_topk_prob", "index_topk", "rms_norm_eps"],
)
def test_a_missing_dimension_is_refused_by_name(raw_config: Raw, key: str) -> None:
    del raw_config[key]
    with pytest.raises(ConfigError, match=key):
        from_dict(raw_config)


@pytest.mark.parametrize("model_type", ["glm5_next", "kimi_k2", None, ["glm_moe_dsa"]])
def test_another_family_is_refused_by_name(raw_config: Raw, model_type: object) -> None:
    with pytest.raises(ConfigError, match="fourge knows glm_moe_dsa"):
        from_dict(raw_config | {"model_type": model_type})


def test_an_architecture_of_another_family_is_refused(raw_config: Raw) -> None:
    with pytest.raises(ConfigError, match="GlmMoeDsaForCausalLM"):
        from_dict(raw_config | {"architectures": ["DeepseekV32ForCausalLM"]})


def test_indexer_keys_in_a_family_without_dsa_are_refused() -> None:
    with pytest.raises(ConfigError, match="no indexer at all"):
        from_dict(DEEPSEEK_V3 | {"index_topk": 2048})
    assert from_dict(DEEPSEEK_V3 | {"index_topk": None}).unknown_keys == ()


def test_a_null_q_lora_rank_means_a_plain_query_projection() -> None:
    assert from_dict(DEEPSEEK_V3 | {"q_lora_rank": None}).q_lora_rank is None


def test_both_forms_of_rope_read_the_same() -> None:
    modern = {key: DEEPSEEK_V3[key] for key in DEEPSEEK_V3 if not key.startswith("rope_")}
    scaling = dict(DEEPSEEK_V3["rope_scaling"])
    modern["rope_parameters"] = scaling | {"rope_type": scaling.pop("type"), "rope_theta": 10000}
    rope = from_dict(modern).rope
    assert rope == from_dict(DEEPSEEK_V3).rope
    assert (rope.rope_type, rope.theta, rope.factor) == ("yarn", 10000.0, 40.0)
    assert (rope.beta_fast, rope.beta_slow, rope.mscale, rope.mscale_all_dim) == (32, 1, 1, 1)
    assert rope.original_max_position_embeddings == 4096
    assert rope.attention_factor is None
    assert rope.truncate


def test_a_missing_yarn_factor_follows_from_the_two_context_lengths() -> None:
    scaling = DEEPSEEK_V3["rope_scaling"] | {"factor": None}
    assert from_dict(DEEPSEEK_V3 | {"rope_scaling": scaling}).rope.factor == 40.0


def test_a_long_value_is_shortened_in_the_message(raw_config: Raw) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(raw_config | {"indexer_types": ["full"] * 500})
    assert len(str(caught.value)) < 400
