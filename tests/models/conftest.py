"""Tiny random models of the four families: transformers' implementation beside ours."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers

from fourge.models import layer as ours
from fourge.models.config import ModelConfig, from_dict
from fourge.models.linear import linear
from fourge.models.norm import rms_norm

# float32 logits, whose largest value is about 4: how far two correct implementations may be apart.
LOGITS_TOLERANCE = 5e-5

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "pad_token_id": None,
}
DENSE_FIRST: dict[str, Any] = {"first_k_dense_replace": 1}
DSA: dict[str, Any] = {"index_topk": 32, "index_n_heads": 16, "index_head_dim": 24}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "glm_moe_dsa": (
        transformers.GlmMoeDsaConfig,
        transformers.GlmMoeDsaForCausalLM,
        DENSE_FIRST | DSA | {"indexer_rope_interleave": True},
    ),
    "glm4_moe_lite": (
        transformers.Glm4MoeLiteConfig,
        transformers.Glm4MoeLiteForCausalLM,
        {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    ),
    "deepseek_v32": (
        transformers.DeepseekV32Config,
        transformers.DeepseekV32ForCausalLM,
        DENSE_FIRST | DSA,
    ),
    "deepseek_v3": (
        transformers.DeepseekV3Config,
        transformers.DeepseekV3ForCausalLM,
        DENSE_FIRST,
    ),
}


class Twin:
    """A random transformers model in float32, and our config and weights of the same model."""

    def __init__(self, family: str, **changes: Any) -> None:
        config_class, model_class, extra = FAMILIES[family]
        hf_config = config_class(**(COMMON | extra | changes))
        hf_config._attn_implementation = "eager"
        hf_config._experts_implementation = "eager"
        self.config: ModelConfig = from_dict(hf_config.to_dict())
        torch.manual_seed(0)
        self.reference = model_class(hf_config).eval().requires_grad_(False)
        _randomise(self.reference)
        _use_configured_eps(self.reference, self.config)
        self.tensors = _unfused(self.reference.state_dict())

    def layer_weights(self, layer: int) -> dict[str, torch.Tensor]:
        prefix = f"model.layers.{layer}."
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    def their_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[L, vocabulary] of one sequence."""
        return self.reference(input_ids=tokens[None], use_cache=False).logits[0]

    def our_logits(
        self, sequences: Sequence[torch.Tensor], dtype: torch.dtype = torch.float32
    ) -> list[torch.Tensor]:
        """The same for sequences packed into one run."""
        lengths = [len(tokens) for tokens in sequences]
        tensors, config = self.tensors, self.config
        hidden_TD = tensors["model.embed_tokens.weight"][torch.cat(list(sequences))].to(dtype)
        rope = ours.rope_table(config, max(lengths), "cpu")
        topk = None
        for layer in range(config.num_hidden_layers):
            hidden_TD, topk = ours.decoder_layer(
                hidden_TD, lengths, self.layer_weights(layer), config, layer, rope, topk
            )
        hidden_TD = rms_norm(hidden_TD, tensors["model.norm.weight"], config.rms_norm_eps)
        return list(linear(hidden_TD, tensors["lm_head.weight"]).split(lengths))


def _randomise(model: torch.nn.Module) -> None:
    """Weights large enough that every part of the model moves the logits."""
    for name, tensor in model.state_dict().items():
        if name.endswith("norm.weight"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(("e_score_correction_bias", "k_norm.bias")):
            tensor.normal_(0, 0.2)
        else:
            tensor.normal_(0, tensor.shape[-1] ** -0.5)


def _use_configured_eps(model: Any, config: ModelConfig) -> None:
    """transformers builds the two latent norms with its default 1e-6 and ignores rms_norm_eps; we
    follow vllm and sglang, which use rms_norm_eps. Put right in transformers, so that the rest can
    be compared exactly.
    """
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.kv_a_layernorm.variance_epsilon = config.rms_norm_eps
        if config.q_lora_rank is not None:
            attention.q_a_layernorm.variance_epsilon = config.rms_norm_eps


def _unfused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers stacks the experts in memory; checkpoints name each one."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        prefix, found, projection = name.partition(".experts.")
        if not found:
            tensors[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            stem = f"{prefix}.experts.{expert}"
            if projection == "gate_up_proj":
                gate, up = matrix.chunk(2)
                tensors |= {f"{stem}.gate_proj.weight": gate, f"{stem}.up_proj.weight": up}
            else:
                tensors[f"{stem}.down_proj.weight"] = matrix
    return tensors


@pytest.fixture(scope="session")
def make_twin() -> Callable[..., Twin]:
    return Twin


@pytest.fixture(scope="session")
def make_tokens() -> Callable[[int, int], torch.Tensor]:
    """Random token ids: (length, seed) -> int64 [length]."""

    def make(length: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(COMMON["vocab_size"], (length,), generator=generator)

    return make


@pytest.fixture(scope="session")
def logits_tolerance() -> float:
    return LOGITS_TOLERANCE


@pytest.fixture
def raw_config() -> dict[str, Any]:
    """A valid glm_moe_dsa config.json of four layers, to be broken by a test."""
    return COMMON | DENSE_FIRST | DSA | {"model_type": "glm_moe_dsa"}
