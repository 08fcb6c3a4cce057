"""Which of several quantizations of an expert comes nearest to it, on tokens held out of the fit.

    error = sum_t g_t^2 |expert(x_t) - quantized expert(x_t)|^2

over the whole expert, gate, up and down together, so that a method that fits its statistics better
and the expert worse is found out. Where the expert has too few held-out tokens of its own, the
layer's sample stands in for them.

Shapes: R tokens, D hidden size.
"""

from collections.abc import Mapping

import torch

from fourge.calibrate.moments import HeldOut
from fourge.formats import kernels
from fourge.models.linear import linear
from fourge.models.moe import inner
from fourge.quantize.methods.expert import Expert, Quantized

# Held-out tokens below which the layer's sample is asked instead.
LEAST_TOKENS = 16


def output_errors(
    expert: Expert, candidates: Mapping[str, Quantized], held_out: HeldOut, sample_RD: torch.Tensor
) -> dict[str, float]:
    """The error of each candidate, as a share of the expert's own output."""
    x_RD, square_R = sample_RD, torch.ones(len(sample_RD), device=sample_RD.device)
    if held_out.kept >= LEAST_TOKENS:
        x_RD, square_R = torch.cat(held_out.x_RD), torch.cat(held_out.gate_R).square()
    names = Expert._fields[1:]
    y_RD = _forward(x_RD, {name: getattr(expert, name).to(x_RD.dtype) for name in names})
    whole = (y_RD.square().sum(-1) * square_R).sum().clamp(min=1e-30)
    errors = {}
    for method, found in candidates.items():
        expanded = {name: kernels.dequantize(found[name], x_RD.dtype) for name in names}
        error_RD = _forward(x_RD, expanded) - y_RD
        errors[method] = float((error_RD.square().sum(-1) * square_R).sum() / whole)
    return errors


def best(errors: Mapping[str, float], method: str) -> str:
    """The candidate with the least error; of equals ``method`` itself."""
    least = min(errors.values())
    return method if errors[method] <= least else min(errors, key=lambda name: errors[name])


def _forward(x_RD: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """float32 [R, D]."""
    return linear(inner(x_RD, weights), weights["down_proj"]).float()
