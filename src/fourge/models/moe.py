"""The MLP half of a decoder layer: dense, or sigmoid-routed experts plus shared experts.

    s = sigmoid(fp32(x) Wg^T);  choose by s + bias (fp32): of the topk_group best groups (a group's
    worth is the sum of its two best) the num_experts_per_tok best experts;  g = s of the chosen,
    divided by their sum + 1e-20 (norm_topk_prob), times routed_scaling_factor, here and only here
    y = residual + shared(x) + sum_e g_e down_e(silu(gate_e x) * up_e x)

Router and sum are float32 whatever the compute dtype. Experts are added in ascending order, so
every split of them into consecutive ranges gives the same bits, and a range may be all that is in
memory. Follows transformers 5.23.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fourge.checkpoint.names import FUSED_DOWN, FUSED_GATE_UP, PROJECTIONS
from fourge.formats import kernels
from fourge.formats.nvfp4 import NVFP4Tensor
from fourge.models import chunks
from fourge.models.config import ModelConfig
from fourge.models.linear import linear, weight_of
from fourge.models.norm import rms_norm

# T tokens, D hidden, K experts per token, E experts, N tokens of one step, I intermediate

# Expert, its input x_ND, the input of its down_proj h_NI, routing weights: see run_experts.
Observer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]


class InputScales(NamedTuple):
    """``input_scale`` of each expert, float32 [E]: its inputs are rounded to NVFP4 with it, with
    block scales of the moment, as engines do when they compute in four bits (W4A4).
    """

    gate_up_E: torch.Tensor
    down_E: torch.Tensor


class Routed(NamedTuple):
    """Tokens on their way through the routed experts."""

    x_TD: torch.Tensor  # what the experts read, compute dtype
    experts_TK: torch.Tensor  # int64
    gates_TK: torch.Tensor  # float32, routed_scaling_factor included
    acc_TD: torch.Tensor  # float32: residual + shared experts, then each routed expert


def dense_mlp(
    hidden_TD: torch.Tensor, weights: Mapping[str, torch.Tensor], config: ModelConfig
) -> torch.Tensor:
    """hidden + MLP(post_attention_layernorm(hidden)), in hidden's dtype."""
    mlp = _cast_mlp(weights, "mlp.", hidden_TD.dtype)
    out_TD = torch.empty_like(hidden_TD)
    for rows in chunks.slices(len(hidden_TD), chunks.ROWS):
        x_ND = _post_norm(hidden_TD[rows], weights, config)
        out_TD[rows] = hidden_TD[rows] + linear(inner(x_ND, mlp), mlp["down_proj"])
    return out_TD


def route(
    hidden_TD: torch.Tensor, weights: Mapping[str, torch.Tensor], config: ModelConfig
) -> Routed:
    """Choose the experts of every token, and compute what does not depend on them."""
    x_TD = torch.empty_like(hidden_TD)
    acc_TD = hidden_TD.to(torch.float32, copy=True)
    shared = (
        _cast_mlp(weights, "mlp.shared_experts.", hidden_TD.dtype)
        if config.n_shared_experts
        else None
    )
    router_ED = weights["mlp.gate.weight"].float()
    bias_E = weights["mlp.gate.e_score_correction_bias"].float()
    chosen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for rows in chunks.slices(len(hidden_TD), chunks.ROWS):
        x_ND = _post_norm(hidden_TD[rows], weights, config)
        x_TD[rows] = x_ND
        if shared is not None:
            acc_TD[rows] += linear(inner(x_ND, shared), shared["down_proj"])
        chosen.append(_choose(linear(x_ND.float(), router_ED), bias_E, config))
    experts, gates = zip(*chosen, strict=True)
    return Routed(x_TD, torch.cat(experts), torch.cat(gates), acc_TD)


def run_experts(
    routed: Routed,
    weights: Mapping[str, torch.Tensor],
    experts: range,
    *,
    observe: Observer | None = None,
    input_scales: InputScales | None = None,
) -> None:
    """Add the experts of the range into ``routed.acc_TD``, in place; other experts' weights are
    not looked at. Weights are BF16 or NVFP4, which is expanded an expert at a time.

    ``observe(expert, x_ND, h_NI, gate_N)`` gets the input of gate and up, the input of down and the
    routing weights of an expert's tokens, in token order, at most chunks.EXPERT_ROWS tokens a
    call; an expert without tokens is not reported.
    """
    num_choices = routed.experts_TK.shape[1]
    expert_S, order_S = routed.experts_TK.flatten().sort(stable=True)
    bounds = torch.searchsorted(
        expert_S, torch.arange(experts.start, experts.stop + 1, device=expert_S.device)
    ).tolist()
    gate_S = routed.gates_TK.flatten()
    for expert, first, end in zip(experts, bounds[:-1], bounds[1:], strict=True):
        if first == end:
            continue
        mlp = _cast_mlp(weights, f"mlp.experts.{expert}.", routed.x_TD.dtype)
        for rows in chunks.slices(end - first, chunks.EXPERT_ROWS):
            slots_N = order_S[first:end][rows]
            tokens_N = slots_N // num_choices
            x_ND = routed.x_TD[tokens_N]
            if input_scales is not None:
                x_ND = kernels.quantize_activations(x_ND, input_scales.gate_up_E[expert])
            h_NI = inner(x_ND, mlp)
            if observe is not None:
                observe(expert, x_ND, h_NI, gate_S[slots_N])
            if input_scales is not None:
                h_NI = kernels.quantize_activations(h_NI, input_scales.down_E[expert])
            y_ND = linear(h_NI, mlp["down_proj"]).float().mul_(gate_S[slots_N, None])
            # A token chooses an expert once, so rows are distinct; index_add_ takes twice as long.
            routed.acc_TD.index_copy_(0, tokens_N, y_ND.add_(routed.acc_TD[tokens_N]))


def run_fused_experts(routed: Routed, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What ``routed.acc_TD`` becomes with all experts added, float32: run_experts for few tokens,
    in one product of all experts. ``weights`` hold them fused, gate rows before up rows: in the
    compute dtype, or on a GPU as NVFP4 codes with ``_scale`` and ``_scale_2`` beside them.
    """
    if f"{FUSED_GATE_UP}_scale" in weights:
        from fourge.models.kernels import gpu_experts

        stacks = (_stack(weights, name) for name in (FUSED_GATE_UP, FUSED_DOWN))
        return routed.acc_TD + gpu_experts.run_experts(*routed[:3], *stacks)
    num_choices = routed.experts_TK.shape[1]
    gate_up_EOD, down_EDI = weights[FUSED_GATE_UP], weights[FUSED_DOWN]
    expert_S, order_S = routed.experts_TK.flatten().sort(stable=True)
    end_E = torch.searchsorted(
        expert_S, torch.arange(len(down_EDI), device=expert_S.device), right=True
    ).int()
    tokens_S = order_S // num_choices
    gate_SI, up_SI = F.grouped_mm(routed.x_TD[tokens_S], gate_up_EOD.mT, offs=end_E).chunk(2, -1)
    y_SD = F.grouped_mm(F.silu(gate_SI).mul_(up_SI), down_EDI.mT, offs=end_E).float()
    y_SD.mul_(routed.gates_TK.flatten()[order_S, None])
    return routed.acc_TD.index_add(0, tokens_S, y_SD)


def _stack(weights: Mapping[str, torch.Tensor], name: str) -> NVFP4Tensor:
    return NVFP4Tensor(weights[name], weights[f"{name}_scale"], weights[f"{name}_scale_2"])


def _choose(
    logits_NE: torch.Tensor, bias_E: torch.Tensor, config: ModelConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts int64 [N, K] and gates float32 [N, K] from the router's float32 logits."""
    score_NE = logits_NE.sigmoid()
    choice_NE = score_NE + bias_E
    if config.n_group > 1:
        grouped = choice_NE.unflatten(-1, (config.n_group, -1))
        worth = grouped.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(worth, dtype=torch.bool)
        kept.scatter_(1, worth.topk(config.topk_group, dim=-1).indices, True)
        choice_NE = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
    experts_NK = choice_NE.topk(config.num_experts_per_tok, dim=-1).indices
    gates_NK = score_NE.gather(1, experts_NK)
    if config.norm_topk_prob:
        gates_NK = gates_NK / (gates_NK.sum(-1, keepdim=True) + 1e-20)
    return experts_NK, gates_NK * config.routed_scaling_factor


def _post_norm(
    hidden_ND: torch.Tensor, weights: Mapping[str, torch.Tensor], config: ModelConfig
) -> torch.Tensor:
    return rms_norm(hidden_ND, weights["post_attention_layernorm.weight"], config.rms_norm_eps)


def _cast_mlp(
    weights: Mapping[str, torch.Tensor], prefix: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """gate_proj, up_proj, down_proj, cast once for all the chunks of rows."""
    return {name: weight_of(weights, f"{prefix}{name}.", dtype) for name in PROJECTIONS}


def inner(x_ND: torch.Tensor, mlp: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """silu(gate x) * up x: the input of down_proj."""
    gate_NI = F.silu(linear(x_ND, mlp["gate_proj"]))
    return gate_NI.mul_(linear(x_ND, mlp["up_proj"]))
