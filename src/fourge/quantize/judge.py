"""Which of several quantizations of an expert comes nearest to it, on tokens held out of the fit.

    error = sum_t g_t^2 |expert(x_t) - quantized expert(x_t)|^2 / sum_t g_t^2 |expert(x_t)|^2

over the whole expert, gate, up and down together, so that a method that fits its statistics better
and the expert worse is found out; with inputs as they are and with inputs rounded to NVFP4, since
it will be served either way. Where the expert has too few held-out tokens of its own, the layer's
sample stands in for them.

Shapes: R tokens, D hidden size.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from fourge.calibrate.moments import HeldOut, as_multiplied
from fourge.formats import kernels
from fourge.models.linear import linear
from fourge.models.moe import inner
from fourge.quantize.methods.expert import Expert, Quantized

# Held-out tokens below which the layer's sample is asked instead.
LEAST_TOKENS = 16


class Errors(NamedTuple):
    """Shares of the expert's own output."""

    w4a16: float
    w4a4: float


def output_errors(
    expert: Expert, candidates: Mapping[str, Quantized], held_out: HeldOut, sample_RD: torch.Tensor
) -> dict[str, Errors]:
    """The errors of each candidate."""
    x_RD, square_R = sample_RD, torch.ones(len(sample_RD), device=sample_RD.device)
    if held_out.kept >= LEAST_TOKENS:
        x_RD, square_R = torch.cat(held_out.x_RD), torch.cat(held_out.gate_R).float().square()
    names = Expert._fields[1:]
    rounded_RD = as_multiplied(x_RD)
    y_RD = _forward(x_RD, {name: getattr(expert, name).to(x_RD.dtype) for name in names}, _as_is)
    whole = (y_RD.square().sum(-1) * square_R).sum().clamp(min=1e-30)
    errors = {}
    for method, found in candidates.items():
        expanded = {name: kernels.dequantize(found[name], x_RD.dtype) for name in names}
        outputs = (
            _forward(x_RD, expanded, _as_is), _forward(rounded_RD, expanded, as_multiplied),
        )  # fmt: skip
        errors[method] = Errors(
            *(
                float(((out_RD - y_RD).square().sum(-1) * square_R).sum() / whole)
                for out_RD in outputs
            )
        )
    return errors


def best(errors: Mapping[str, Errors], method: str) -> str:
    """The candidate with the least error in both lanes together; of equals ``method`` itself, if it
    is among them.
    """
    return min(errors, key=lambda name: (sum(errors[name]), name != method))


def _as_is(x: torch.Tensor) -> torch.Tensor:
    return x


def _forward(
    x_RD: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    read: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """float32 [R, D]; ``read``: what becomes of the input of down."""
    return linear(read(inner(x_RD, weights)), weights["down_proj"]).float()
