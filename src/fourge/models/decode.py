"""A decoder layer over few new tokens, on the CPU in float32: the fast twin of cached.py.

Dense products that read the same input are one product of weights laid side by side; what lies
between them is kernels/decode.py and routing.py. Every token is attended by itself, so sequences
may bring any number of tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from fourge.checkpoint.names import FUSED_DOWN, FUSED_GATE_UP
from fourge.models.config import ModelConfig
from fourge.models.kernels import decode as kernels
from fourge.models.kernels import routing
from fourge.models.rope import softmax_factor

# T new tokens, S sequences, P pages of the longest, Z slots of the cache, D hidden, A columns of a
# joint product, O key and value rows, X latent and rotated key, I index head size, K selected
# positions, L numbers of index keys of all pages

Array = np.ndarray[Any, Any]

_NONE = np.empty(0, np.float32)


class Rows(NamedTuple):
    """A layer's cache, float32."""

    latents_ZX: Array
    index_keys_LS: Array  # I rows a page; of no rows where the layer has no indexer


class DecodeStep(NamedTuple):
    """Where the new tokens of a step lie, int64; arrays of all positions' rotations."""

    slot_T: Array
    position_T: Array
    sequence_T: Array
    page_SP: Array
    first: int  # as in cached.Run
    longest: int  # positions up to the last
    cos_PR: Array
    sin_PR: Array
    looks_again: bool = False  # as in cached.Step


class Selection(NamedTuple):
    """The slots that each token looks at: the first ``count_T`` of its row."""

    slot_TK: Array
    count_T: Array


@dataclass(frozen=True, slots=True)
class DecodeWeights:
    """A layer's weights: those of products [in, out], those of one input side by side."""

    input_norm: Array
    first_DA: torch.Tensor  # [query latent | latent | rotated key | index key | head weights]
    query_norm: Array  # of no numbers without q_lora
    latent_norm: Array
    index_norm: tuple[Array, Array]  # weight and bias, of no numbers without an indexer
    queries_QA: torch.Tensor  # [queries of all heads | index queries]
    joint_OC: Array
    out_AD: torch.Tensor
    post_norm: Array
    mlp_DA: torch.Tensor  # [router | gate | up]
    down_ID: torch.Tensor  # dense, or of the shared experts
    router_bias: Array  # of no numbers in a dense layer
    experts: tuple[Array, Array] | None  # gate and up [E, 2 I, D], down [E, D, I]; None if dense


def decode_weights(
    weights: Mapping[str, torch.Tensor], config: ModelConfig, layer: int
) -> DecodeWeights:
    """Copies of all but the routed experts. ``weights`` are float32, experts fused."""
    # A layer that shares another's selection may have an indexer all the same.
    unused = () if config.has_indexer(layer) else ("self_attn.indexer.",)
    weights = {name: one for name, one in weights.items() if not name.startswith(unused)}

    def array(name: str) -> Array:
        return weights[name].numpy() if name in weights else _NONE

    def joined(*names: str) -> torch.Tensor:
        return torch.cat([weights[name] for name in names if name in weights]).t().contiguous()

    sparse = config.is_sparse(layer)
    mlp = "mlp.shared_experts." if sparse else "mlp."
    inner = sparse and not config.n_shared_experts
    attention, indexer = "self_attn.", "self_attn.indexer."
    return DecodeWeights(
        input_norm=array("input_layernorm.weight"),
        first_DA=joined(
            f"{attention}q_a_proj.weight",
            f"{attention}kv_a_proj_with_mqa.weight",
            f"{indexer}wk.weight",
            f"{indexer}weights_proj.weight",
        ),
        query_norm=array(f"{attention}q_a_layernorm.weight"),
        latent_norm=array(f"{attention}kv_a_layernorm.weight"),
        index_norm=(array(f"{indexer}k_norm.weight"), array(f"{indexer}k_norm.bias")),
        queries_QA=joined(
            f"{attention}q_b_proj.weight", f"{attention}q_proj.weight", f"{indexer}wq_b.weight"
        ),
        joint_OC=array(f"{attention}kv_b_proj.weight"),
        out_AD=joined(f"{attention}o_proj.weight"),
        post_norm=array("post_attention_layernorm.weight"),
        mlp_DA=joined("mlp.gate.weight", f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"),
        down_ID=torch.empty(0) if inner else joined(f"{mlp}down_proj.weight"),
        router_bias=array("mlp.gate.e_score_correction_bias"),
        experts=(array(FUSED_GATE_UP), array(FUSED_DOWN)) if sparse else None,
    )


def decode_layer(
    hidden_TD: Array,
    step: DecodeStep,
    weights: DecodeWeights,
    config: ModelConfig,
    rows: Rows,
    selection: Selection | None,
) -> tuple[Array, Selection]:
    """As cached.cached_layer; ``hidden_TD`` is changed and returned."""
    eps = np.float32(config.rms_norm_eps)
    attended_TD, selection = _attend(hidden_TD, step, weights, config, rows, selection)
    x_TD = np.empty_like(hidden_TD)
    kernels.add_and_norm(hidden_TD, attended_TD, weights.post_norm, eps, x_TD)
    joint_TA = _product(x_TD, weights.mlp_DA)
    if len(weights.down_ID):
        inner_TI = np.empty((len(x_TD), len(weights.down_ID)), np.float32)
        kernels.silu_times(joint_TA, weights.router_bias.size, inner_TI)
        torch.from_numpy(hidden_TD).addmm_(torch.from_numpy(inner_TI), weights.down_ID)
    if weights.experts is not None:
        expert_TK, gate_TK = _choose_experts(joint_TA, weights, config)
        kernels.add_experts(x_TD, expert_TK, gate_TK, *weights.experts, hidden_TD)
    return hidden_TD, selection


def _product(x_TD: Array, weight_DA: torch.Tensor) -> Array:
    return torch.mm(torch.from_numpy(x_TD), weight_DA).numpy()


def norm(hidden_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """As norm.rms_norm."""
    return torch.from_numpy(_norm(hidden_TD.numpy(), weight_D.numpy(), eps))


def _norm(hidden_TD: Array, weight_D: Array, eps: float) -> Array:
    x_TD = np.empty_like(hidden_TD)
    kernels.add_and_norm(hidden_TD, hidden_TD[:0], weight_D, np.float32(eps), x_TD)
    return x_TD


def keep(
    hidden_TD: Array, step: DecodeStep, weights: DecodeWeights, config: ModelConfig, rows: Rows
) -> tuple[Array, Array]:
    """As cached.keep: the joint product of the layer's input, and the query latent, normed."""
    x_TD = _norm(hidden_TD, weights.input_norm, config.rms_norm_eps)
    first_TA = _product(x_TD, weights.first_DA)
    query_TQ, num_query = x_TD, weights.query_norm.size
    if num_query:
        query_TQ = np.empty((len(x_TD), num_query), np.float32)
    kernels.keep(
        first_TA, weights.query_norm, weights.latent_norm, np.float32(config.rms_norm_eps),
        *weights.index_norm, step.position_T, step.cos_PR, step.sin_PR, config.rope_interleave,
        config.indexer_rope_interleave, step.slot_T, *rows, query_TQ,
    )  # fmt: skip
    return first_TA, query_TQ


def _attend(
    hidden_TD: Array,
    step: DecodeStep,
    weights: DecodeWeights,
    config: ModelConfig,
    rows: Rows,
    selection: Selection | None,
) -> tuple[Array, Selection]:
    first_TA, query_TQ = keep(hidden_TD, step, weights, config, rows)
    ropes = step.position_T, step.cos_PR, step.sin_PR
    query_TA = _product(query_TQ, weights.queries_QA)
    if selection is None or (weights.index_norm[0].size and not step.looks_again):
        selection = _select(first_TA, query_TA, step, weights, config, rows)
    out_TA = np.empty((len(query_TA), len(weights.out_AD)), np.float32)
    scale = np.float32(config.qk_head_dim**-0.5 * softmax_factor(config.rope))
    kernels.attend(
        query_TA, *ropes, config.rope_interleave, *selection, rows.latents_ZX, weights.joint_OC,
        config.num_attention_heads, scale, out_TA,
    )  # fmt: skip
    return _product(out_TA, weights.out_AD), selection


def _select(
    first_TA: Array, query_TA: Array, step: DecodeStep, weights: DecodeWeights,
    config: ModelConfig, rows: Rows,
) -> Selection:  # fmt: skip
    """Of a layer without an indexer: everything."""
    most, num_tokens = step.longest, len(step.position_T)
    num_index = weights.index_norm[0].size
    if num_index:
        most = min(most, config.index_topk)
    selection = Selection(np.empty((num_tokens, most), np.int64), np.empty(num_tokens, np.int64))
    kernels.select(
        query_TA, config.num_attention_heads * config.qk_head_dim,
        first_TA, weights.query_norm.size + rows.latents_ZX.shape[1] + num_index,
        step.position_T, step.cos_PR, step.sin_PR, config.indexer_rope_interleave,
        step.sequence_T, step.page_SP, step.first, rows.index_keys_LS, config.index_n_heads,
        *selection,
    )  # fmt: skip
    return selection


def _choose_experts(
    joint_TA: Array, weights: DecodeWeights, config: ModelConfig
) -> tuple[Array, Array]:
    shape = len(joint_TA), config.num_experts_per_tok
    expert_TK, gate_TK = np.empty(shape, np.int64), np.empty(shape, np.float32)
    routing.choose_experts(
        joint_TA, weights.router_bias, config.n_group, config.topk_group, config.norm_topk_prob,
        np.float32(config.routed_scaling_factor), expert_TK, gate_TK,
    )  # fmt: skip
    return expert_TK, gate_TK
