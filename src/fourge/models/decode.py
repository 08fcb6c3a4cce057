"""A decoder layer over few new tokens, on the CPU in float32: the fast twin of cached.py.

Dense products that read the same input are one product of weights laid one below the other; what
lies between them is kernels/decode.py. Every token is attended by itself, so sequences may bring
any number of tokens. Experts that are large are left to torch's grouped product.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from fourge.checkpoint.names import FUSED_DOWN, FUSED_GATE_UP
from fourge.models.config import ModelConfig
from fourge.models.kernels import decode as kernels
from fourge.models.moe import Routed, run_fused_experts
from fourge.models.rope import softmax_factor

# T new tokens, S sequences, P pages of the longest, Z slots of the cache, D hidden, A columns of a
# joint product, X latent and rotated key, I index head size, K selected positions

Array = np.ndarray[Any, Any]

# Numbers of an expert's down projection up to which kernels/decode.py takes it.
SMALL_EXPERT = 1 << 30
_NONE = np.empty(0, np.float32)


class Rows(NamedTuple):
    """A layer's cache, float32."""

    latents_ZX: Array
    index_keys_ZI: Array  # of no rows where the layer has no indexer


class DecodeStep(NamedTuple):
    """Where the new tokens of a step lie, int64; arrays of all positions' rotations."""

    slot_T: Array
    position_T: Array
    sequence_T: Array
    page_SP: Array
    first: int  # as in cached.Run
    cos_PR: Array
    sin_PR: Array


class Selection(NamedTuple):
    """The slots that each token looks at: the first ``count_T`` of its row."""

    slot_TK: Array
    count_T: Array


@dataclass(frozen=True, slots=True)
class DecodeWeights:
    """A layer's weights, those of one input together; transposed, as torch.mm wants them."""

    input_norm: Array
    first_DA: torch.Tensor  # [query latent | latent | rotated key | index key | head weights]
    query_norm: Array  # of no numbers without q_lora
    latent_norm: Array
    index_norm: tuple[Array, Array]
    queries_QA: torch.Tensor  # [queries of all heads | index queries]
    joint_HOC: Array
    out_AD: torch.Tensor
    post_norm: Array
    mlp_DA: torch.Tensor  # [router | gate | up]
    down_ID: torch.Tensor  # dense, or of the shared experts
    router_bias: Array  # of no numbers in a dense layer
    experts: Mapping[str, torch.Tensor]  # fused; empty in a dense layer


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
        return torch.cat([weights[name] for name in names if name in weights]).t()

    sparse = config.is_sparse(layer)
    mlp = "mlp.shared_experts." if sparse else "mlp."
    down = weights.get(f"{mlp}down_proj.weight", torch.empty(config.hidden_size, 0))
    attention, indexer = "self_attn.", "self_attn.indexer."
    return DecodeWeights(
        input_norm=array("input_layernorm.weight"),
        first_DA=joined(
            f"{attention}q_a_proj.weight", f"{attention}kv_a_proj_with_mqa.weight",
            f"{indexer}wk.weight", f"{indexer}weights_proj.weight",
        ),  # fmt: skip
        query_norm=array(f"{attention}q_a_layernorm.weight"),
        latent_norm=array(f"{attention}kv_a_layernorm.weight"),
        index_norm=(array(f"{indexer}k_norm.weight"), array(f"{indexer}k_norm.bias")),
        queries_QA=joined(
            f"{attention}q_b_proj.weight", f"{attention}q_proj.weight", f"{indexer}wq_b.weight"
        ),
        joint_HOC=weights[f"{attention}kv_b_proj.weight"]
        .unflatten(0, (config.num_attention_heads, -1))
        .numpy(),
        out_AD=weights[f"{attention}o_proj.weight"].t(),
        post_norm=array("post_attention_layernorm.weight"),
        mlp_DA=joined("mlp.gate.weight", f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"),
        down_ID=down.t(),
        router_bias=array("mlp.gate.e_score_correction_bias"),
        experts={name: weights[name] for name in (FUSED_GATE_UP, FUSED_DOWN) if sparse},
    )


def decode_layer(
    hidden_TD: torch.Tensor,
    step: DecodeStep,
    weights: DecodeWeights,
    config: ModelConfig,
    rows: Rows,
    selection: Selection | None,
) -> tuple[torch.Tensor, Selection]:
    """As cached.cached_layer; ``hidden_TD`` is changed and returned."""
    hidden, eps = hidden_TD.numpy(), np.float32(config.rms_norm_eps)
    x_TD = torch.empty_like(hidden_TD)
    kernels.add_and_norm(hidden, hidden[:0], weights.input_norm, eps, x_TD.numpy())
    attended_TD, selection = _attend(x_TD, step, weights, config, rows, selection)
    kernels.add_and_norm(hidden, attended_TD.numpy(), weights.post_norm, eps, x_TD.numpy())
    joint_TA = x_TD @ weights.mlp_DA
    if len(weights.down_ID):
        inner_TI = torch.empty(len(x_TD), len(weights.down_ID))
        kernels.silu_times(joint_TA.numpy(), weights.router_bias.size, inner_TI.numpy())
        hidden_TD.addmm_(inner_TI, weights.down_ID)
    if weights.experts:
        hidden_TD = _add_experts(hidden_TD, x_TD, joint_TA, weights, config)
    return hidden_TD, selection


def _attend(
    x_TD: torch.Tensor,
    step: DecodeStep,
    weights: DecodeWeights,
    config: ModelConfig,
    rows: Rows,
    selection: Selection | None,
) -> tuple[torch.Tensor, Selection]:
    first_TA = x_TD @ weights.first_DA
    first, ropes = first_TA.numpy(), (step.position_T, step.cos_PR, step.sin_PR)
    query_TQ, num_query = x_TD, weights.query_norm.size
    if num_query:
        query_TQ = torch.empty(len(x_TD), num_query)
    kernels.keep_latents(
        first, weights.query_norm, weights.latent_norm, np.float32(config.rms_norm_eps), *ropes,
        config.rope_interleave, step.slot_T, rows.latents_ZX, query_TQ.numpy(),
    )  # fmt: skip
    queries = (query_TQ @ weights.queries_QA).numpy()
    num_index = weights.index_norm[0].size
    if num_index:
        kernels.keep_index_keys(
            first, num_query + rows.latents_ZX.shape[1], *weights.index_norm, *ropes,
            config.indexer_rope_interleave, step.slot_T, rows.index_keys_ZI,
        )  # fmt: skip
    if num_index or selection is None:
        selection = _select(first, queries, step, weights, config, rows)
    out_TA = torch.empty(len(x_TD), len(weights.out_AD))
    scale = np.float32(config.qk_head_dim**-0.5 * softmax_factor(config.rope))
    kernels.attend(
        queries, *ropes, config.rope_interleave, *selection, rows.latents_ZX, weights.joint_HOC,
        scale, out_TA.numpy(),
    )  # fmt: skip
    return out_TA @ weights.out_AD, selection


def _select(
    first: Array, queries: Array, step: DecodeStep, weights: DecodeWeights, config: ModelConfig,
    rows: Rows,
) -> Selection:  # fmt: skip
    """Of a layer without an indexer: everything."""
    most, num_tokens = int(step.position_T.max()) + 1, len(step.position_T)
    num_index = weights.index_norm[0].size
    if num_index:
        most = min(most, config.index_topk)
    selection = Selection(np.empty((num_tokens, most), np.int64), np.empty(num_tokens, np.int64))
    kernels.select(
        queries, config.num_attention_heads * config.qk_head_dim,
        first, weights.query_norm.size + rows.latents_ZX.shape[1] + num_index,
        step.position_T, step.cos_PR, step.sin_PR, config.indexer_rope_interleave,
        step.sequence_T, step.page_SP, step.first, rows.index_keys_ZI, *selection,
    )  # fmt: skip
    return selection


def _add_experts(
    hidden_TD: torch.Tensor, x_TD: torch.Tensor, joint_TA: torch.Tensor, weights: DecodeWeights,
    config: ModelConfig,
) -> torch.Tensor:  # fmt: skip
    shape = len(x_TD), config.num_experts_per_tok
    expert_TK, gate_TK = torch.empty(shape, dtype=torch.int64), torch.empty(shape)
    kernels.choose_experts(
        joint_TA.numpy(), weights.router_bias, config.n_group, config.topk_group,
        config.norm_topk_prob, np.float32(config.routed_scaling_factor), expert_TK.numpy(),
        gate_TK.numpy(),
    )  # fmt: skip
    gate_up_EOD, down_EDI = weights.experts[FUSED_GATE_UP], weights.experts[FUSED_DOWN]
    if down_EDI[0].numel() > SMALL_EXPERT:
        return run_fused_experts(Routed(x_TD, expert_TK, gate_TK, hidden_TD), weights.experts)
    kernels.add_experts(
        x_TD.numpy(), expert_TK.numpy(), gate_TK.numpy(), gate_up_EOD.numpy(), down_EDI.numpy(),
        hidden_TD.numpy(),
    )  # fmt: skip
    return hidden_TD
