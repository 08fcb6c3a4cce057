"""config.json -> ModelConfig, strictly.

A value that the mathematics of this room does not cover is a ConfigError, never ignored; a key that
is neither used nor known to be harmless is reported in ``unknown_keys``. Both forms are read:
rope_theta / rope_scaling at the top (as published) and rope_parameters (transformers 5).
Precedence follows transformers 5.23, vllm 0.33 and sglang 0.5.23 where they agree; where two keys
of one file say different things about the same layer, those three disagree, so that is an error.
``indexer_rope_interleave`` missing means NeoX (half-split), as vllm and sglang read it, although
transformers always interleaves for glm_moe_dsa. Imports no torch; knows nothing of quantization.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from fourge.errors import ConfigError
from fourge.models.fields import boolean, integer, number, refused, strings
from fourge.models.kinds import indexer_types, mlp_contradiction, mlp_types

ARCHITECTURES = {
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
DSA_FAMILIES = frozenset({"glm_moe_dsa", "deepseek_v32"})

# The only value computed here; an absent or null key means this value in transformers too.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "partial_rotary_factor": 1.0,
    "moe_router_dtype": "float32",
}

_INDEXER_KEYS = frozenset({
    "index_topk", "index_n_heads", "index_head_dim", "indexer_rope_interleave", "indexer_types",
    "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"
})  # fmt: skip

_SHARING_KEYS = frozenset({
    "indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"
})  # fmt: skip

_USED = frozenset({
    "model_type", "architectures", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "rope_interleave", "rope_theta", "rope_scaling",
    "rope_parameters", "layer_types", "mlp_layer_types", "first_k_dense_replace",
    "intermediate_size", "moe_intermediate_size", "n_routed_experts", "num_local_experts",
    "num_experts_per_tok", "n_shared_experts", "n_group", "topk_group", "norm_topk_prob",
    "routed_scaling_factor", "num_nextn_predict_layers", "index_share_for_mtp_iteration", *_FIXED
})  # fmt: skip

# Tokens, training, generation, parallelism, bookkeeping: they do not touch the forward pass.
_HARMLESS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "attention_dropout",
    "auto_map", "aux_loss_alpha", "bos_token_id", "chunk_size_feed_forward", "compression_config",
    "dtype", "eos_token_id", "ep_size", "head_dim", "id2label", "initializer_range",
    "is_encoder_decoder", "label2id", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp",
    "problem_type", "quantization_config", "return_dict", "router_aux_loss_coef", "seq_aux",
    "torch_dtype", "transformers_version", "use_cache"
})  # fmt: skip

_ROPE_KEYS = frozenset({
    "rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings", "beta_fast",
    "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate", "partial_rotary_factor"
})  # fmt: skip

_LAYER_TYPES = frozenset({"indexed_attention", "deepseek_sparse_attention", "full_attention"})


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary embedding of attention and indexer; the type "default" uses ``theta`` alone."""

    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A model of one of the four families; names are those of config.json where it has them."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    # MLA
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleave: bool
    rope: RopeConfig
    # DSA: "full" or "shared" per layer; empty, and zeros, without an indexer
    indexer_types: tuple[str, ...]
    index_topk: int
    index_n_heads: int
    index_head_dim: int
    indexer_rope_interleave: bool
    # MLP: "dense" or "sparse" per layer
    mlp_types: tuple[str, ...]
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    # MTP
    num_nextn_predict_layers: int
    index_share_for_mtp_iteration: bool  # drafts after the first look where the first one looked
    # Of config.json: keys that are neither used nor known to be harmless; sentences for the user
    unknown_keys: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def uses_dsa(self) -> bool:
        return bool(self.indexer_types)

    @property
    def mtp_layers(self) -> range:
        """Indices of the MTP layers: they follow the decoder layers."""
        return range(self.num_hidden_layers, self.num_hidden_layers + self.num_nextn_predict_layers)

    def is_sparse(self, layer: int) -> bool:
        """Whether ``layer`` has routed experts; an MTP layer always has."""
        return layer >= self.num_hidden_layers or self.mlp_types[layer] == "sparse"

    def has_indexer(self, layer: int) -> bool:
        """Whether ``layer`` selects by itself; an MTP layer does wherever the family has DSA."""
        if layer >= self.num_hidden_layers:
            return self.uses_dsa
        return self.uses_dsa and self.indexer_types[layer] == "full"


def from_dict(raw: Mapping[str, Any]) -> ModelConfig:
    """Check the contents of a config.json and resolve what is derived. Raises ConfigError."""
    model_type = _model_type(raw)
    uses_dsa = model_type in DSA_FAMILIES
    _check_fixed(raw, uses_dsa=uses_dsa)
    num_layers = integer(raw, "num_hidden_layers")
    config = ModelConfig(
        model_type=model_type,
        hidden_size=integer(raw, "hidden_size"),
        num_hidden_layers=num_layers,
        num_attention_heads=integer(raw, "num_attention_heads"),
        vocab_size=integer(raw, "vocab_size"),
        max_position_embeddings=integer(raw, "max_position_embeddings"),
        rms_norm_eps=number(raw, "rms_norm_eps"),
        tie_word_embeddings=boolean(raw, "tie_word_embeddings", default=False),
        q_lora_rank=_q_lora_rank(raw),
        kv_lora_rank=integer(raw, "kv_lora_rank"),
        qk_nope_head_dim=integer(raw, "qk_nope_head_dim"),
        qk_rope_head_dim=integer(raw, "qk_rope_head_dim"),
        v_head_dim=integer(raw, "v_head_dim"),
        rope_interleave=boolean(raw, "rope_interleave", default=True),
        rope=_rope(raw),
        indexer_types=indexer_types(raw, num_layers) if uses_dsa else (),
        index_topk=integer(raw, "index_topk") if uses_dsa else 0,
        index_n_heads=integer(raw, "index_n_heads") if uses_dsa else 0,
        index_head_dim=integer(raw, "index_head_dim") if uses_dsa else 0,
        indexer_rope_interleave=boolean(raw, "indexer_rope_interleave", default=False),
        mlp_types=mlp_types(raw, num_layers),
        intermediate_size=integer(raw, "intermediate_size"),
        moe_intermediate_size=integer(raw, "moe_intermediate_size"),
        n_routed_experts=integer(raw, "n_routed_experts"),
        num_experts_per_tok=integer(raw, "num_experts_per_tok"),
        n_shared_experts=integer(raw, "n_shared_experts", minimum=0),
        n_group=integer(raw, "n_group"),
        topk_group=integer(raw, "topk_group"),
        norm_topk_prob=boolean(raw, "norm_topk_prob"),
        routed_scaling_factor=number(raw, "routed_scaling_factor"),
        num_nextn_predict_layers=integer(raw, "num_nextn_predict_layers", minimum=0, default=0),
        index_share_for_mtp_iteration=uses_dsa
        and boolean(raw, "index_share_for_mtp_iteration", default=False),
        unknown_keys=_unknown_keys(raw),
        warnings=_warnings(raw, num_layers),
    )
    _check_agreement(raw, config)
    return config


def overridden(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``raw`` with some keys replaced, as vllm's --hf-overrides does; ConfigError for a key that
    is not known. Who says which layers share a selection takes back what other keys say about it,
    which sglang's --json-model-override-args does not (sglang 0.5.23 config.py:405-424).
    """
    known = _USED | _INDEXER_KEYS
    for key in overrides:
        if key not in known:
            near = get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else "it would change nothing; leave it out."
            raise ConfigError(f"the override {key!r} is no key that fourge reads: {hint}")
    taken_back = _SHARING_KEYS if _SHARING_KEYS & overrides.keys() else frozenset()
    return {key: raw[key] for key in raw if key not in taken_back} | dict(overrides)


def _unknown_keys(raw: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(sorted(raw.keys() - _USED - _INDEXER_KEYS - _HARMLESS))


def _warnings(raw: Mapping[str, Any], num_layers: int) -> tuple[str, ...]:
    contradiction = mlp_contradiction(raw, num_layers)
    return (
        *(f"config.json key {key} is not known and was not used" for key in _unknown_keys(raw)),
        *([contradiction] if contradiction else []),
    )


def _model_type(raw: Mapping[str, Any]) -> str:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ConfigError(
            f"config.json has model_type {model_type!r}; fourge knows {', '.join(ARCHITECTURES)}:"
            " choose a checkpoint of one of these families."
        )
    architectures = strings(raw, "architectures")
    if architectures and architectures != [ARCHITECTURES[model_type]]:
        # The two decide different things in different engines (which class, which rope style).
        raise refused(
            "architectures",
            architectures,
            f"[{ARCHITECTURES[model_type]!r}] with model_type {model_type!r}",
        )
    return model_type


def _check_fixed(raw: Mapping[str, Any], *, uses_dsa: bool) -> None:
    for key, value in _FIXED.items():
        if raw.get(key) is not None and raw[key] != value:
            raise refused(key, raw[key], repr(value))
    if not uses_dsa:
        for key in sorted(_INDEXER_KEYS & raw.keys()):
            if raw[key] is not None:
                raise refused(
                    key, raw[key], f"no indexer at all, since model_type is {raw['model_type']!r}"
                )
    unknown = set(strings(raw, "layer_types") or ()) - _LAYER_TYPES
    if unknown:
        raise refused("layer_types", sorted(unknown), f"only {', '.join(sorted(_LAYER_TYPES))}")


def _check_agreement(raw: Mapping[str, Any], config: ModelConfig) -> None:
    derived = {
        "num_key_value_heads": config.num_attention_heads,
        "qk_head_dim": config.qk_head_dim,
        "num_local_experts": config.n_routed_experts,
    }
    for key, value in derived.items():
        if raw.get(key) is not None and raw[key] != value:
            raise refused(key, raw[key], f"{value}, which follows from the other keys")
    if config.qk_rope_head_dim % 2:
        raise refused("qk_rope_head_dim", config.qk_rope_head_dim, "an even number")
    if config.uses_dsa and config.q_lora_rank is None:
        raise refused("q_lora_rank", None, "a number: the indexer reads the query latent")
    if config.uses_dsa and config.index_head_dim < config.qk_rope_head_dim:
        raise refused("index_head_dim", config.index_head_dim, "at least qk_rope_head_dim")
    if config.n_routed_experts % config.n_group:
        raise refused("n_group", config.n_group, f"a divisor of {config.n_routed_experts} experts")
    group_size = config.n_routed_experts // config.n_group
    if config.n_group > 1 and group_size < 2:
        raise refused("n_group", config.n_group, "groups of two experts or more")
    if config.topk_group > config.n_group:
        raise refused("topk_group", config.topk_group, f"at most n_group = {config.n_group}")
    reachable = config.topk_group * group_size
    if config.num_experts_per_tok > reachable:
        raise refused("num_experts_per_tok", config.num_experts_per_tok, f"at most {reachable}")


def _q_lora_rank(raw: Mapping[str, Any]) -> int | None:
    """None, which means a plain q_proj, must be written as null: a missing key is an error."""
    if "q_lora_rank" in raw and raw["q_lora_rank"] is None:
        return None
    return integer(raw, "q_lora_rank")


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    found = [
        _rope_from(raw, key, raw[key])
        for key in ("rope_parameters", "rope_scaling")
        if raw.get(key) is not None
    ] or [_rope_from(raw, "rope_theta", {})]
    if found[0] != found[-1]:
        raise refused("rope_scaling", raw["rope_scaling"], "the same as rope_parameters says")
    return found[0]


def _rope_from(raw: Mapping[str, Any], key: str, value: object) -> RopeConfig:
    if not isinstance(value, dict) or not value.keys() <= _ROPE_KEYS:
        raise refused(
            key, value, f"an object with no other keys than {', '.join(sorted(_ROPE_KEYS))}"
        )
    rope = {name: item for name, item in value.items() if item is not None}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("type", rope_type) != rope_type or rope_type not in ("default", "yarn"):
        raise refused(f"{key} type", rope_type, "'default' or 'yarn'")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise refused(f"{key} partial_rotary_factor", rope["partial_rotary_factor"], "1.0")
    top = raw.get("rope_theta")
    if top is not None and rope.get("rope_theta", top) != top:
        raise refused("rope_theta", top, f"the same as {key} says ({rope['rope_theta']!r})")
    theta = number(raw if "rope_theta" not in rope else rope, "rope_theta")
    if rope_type == "default":
        return RopeConfig(theta=theta)
    longest = integer(raw, "max_position_embeddings")
    original = integer(rope, "original_max_position_embeddings", default=longest)
    return RopeConfig(
        theta=theta,
        rope_type="yarn",
        factor=number(rope, "factor", default=longest / original),
        original_max_position_embeddings=original,
        beta_fast=number(rope, "beta_fast", default=32.0),
        beta_slow=number(rope, "beta_slow", default=1.0),
        mscale=number(rope, "mscale", default=0.0),
        mscale_all_dim=number(rope, "mscale_all_dim", default=0.0),
        attention_factor=(number(rope, "attention_factor") if "attention_factor" in rope else None),
        truncate=boolean(rope, "truncate", default=True),
    )
