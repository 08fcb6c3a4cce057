"""``local-hessian+descent``: scales and codes together, against the error of whole rows.

    minimise (q - w)^T H (q - w) over rows q of NVFP4 values

Begins with local-hessian's scales and nearest codes, then goes through the blocks of 16 columns,
``ROUNDS`` times. With all other blocks as they are, the best real numbers for block b would be

    t = q_b - H_bb^-1 (H (q - w))_b

so its scale is searched anew for t, by H_bb, and its codes descend from there (formats/search.py);
the old scale's codes descend too, and the better block stays. Every step lowers the error or leaves
it. What GPTQ does once, column after column without looking back, is a first step of this: begun
from GPTQ's codes it ends where it ends without (docs/quality.md).
"""

from typing import NamedTuple

import torch

from fourge.calibrate.moments import Measures
from fourge.formats import kernels
from fourge.formats.layout import BLOCK_SIZE
from fourge.formats.nvfp4 import NVFP4Tensor
from fourge.models import chunks
from fourge.quantize.methods.expert import POOLS, Expert, Quantized
from fourge.quantize.methods.full import Full, full_measure
from fourge.quantize.methods.search import Scales, search_expert

ROUNDS = 2
# Changes reach columns beyond a panel of so many in one product when it is done.
PANEL = 128

# N rows, K columns, P columns of a panel, S = 16


def quantize_expert(expert: Expert, measures: Measures) -> Quantized:
    """CheckpointError if a weight is NaN or infinite."""
    fulls = [full_measure(one) for one in measures]
    begun = search_expert(expert, [full.factor_BSS for full in fulls])
    return {
        name: _quantize(getattr(expert, name), begun[name], full)
        for pool, full in zip(POOLS, fulls, strict=True)
        for name in pool
    }


def _quantize(weight: torch.Tensor, begun: Scales, full: Full) -> NVFP4Tensor:
    w_NK, (scale_NB, scale_2) = weight.float(), begun
    q_NK = kernels.dequantize(kernels.round_to(w_NK, scale_NB, scale_2))
    slope_NK = (q_NK - w_NK) @ full.measure_KK
    for _ in range(ROUNDS):
        for panel in chunks.slices(w_NK.shape[1], PANEL):
            before_NP, slope_NP = q_NK[:, panel].clone(), slope_NK[:, panel].clone()
            for first in range(panel.start, panel.stop, BLOCK_SIZE):
                block = Block(first, panel)
                _improve(block, q_NK, scale_NB, slope_NP, scale_2, full)
            slope_NK.addmm_(q_NK[:, panel] - before_NP, full.measure_KK[panel])
    return kernels.round_to(q_NK, scale_NB, scale_2)


class Block(NamedTuple):
    """Sixteen columns, within a panel."""

    first: int
    panel: slice

    @property
    def number(self) -> int:
        return self.first // BLOCK_SIZE

    @property
    def columns(self) -> slice:
        return slice(self.first, self.first + BLOCK_SIZE)

    @property
    def in_panel(self) -> slice:
        """Its columns as the panel counts them."""
        start = self.first - self.panel.start
        return slice(start, start + BLOCK_SIZE)


def _improve(
    block: Block, q_NK: torch.Tensor, scale_NB: torch.Tensor, slope_NP: torch.Tensor,
    scale_2: torch.Tensor, full: Full,
) -> None:  # fmt: skip
    """Replace a block's scales and codes where that lowers the error; keeps slope = (q - w) H in
    its panel.
    """
    measure_SP = full.measure_KK[block.columns, block.panel]
    measure_SS = measure_SP[:, block.in_panel].contiguous()
    q_NS = q_NK[:, block.columns]
    target_NS = q_NS - slope_NP[:, block.in_panel] @ full.inverse_BSS[block.number]
    old_N = scale_NB[:, block.number].contiguous()
    factor = full.factor_BSS[block.number, None]
    new_N = kernels.search_scales(target_NS, scale_2, factor)[:, 0]
    old, new = (
        kernels.descend(target_NS, scale_N, scale_2, measure_SS) for scale_N in (old_N, new_N)
    )
    is_better_N = new.loss_N < old.loss_N
    found_NS = torch.where(is_better_N[:, None], new.value_NS, old.value_NS)
    slope_NP.addmm_(found_NS - q_NS, measure_SP)
    q_NS.copy_(found_NS)
    codes_N = torch.where(is_better_N, new_N.view(torch.uint8), old_N.view(torch.uint8))
    scale_NB[:, block.number] = codes_N.view(torch.float8_e4m3fn)
