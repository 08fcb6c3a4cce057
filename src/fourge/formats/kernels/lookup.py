"""NVFP4 expanded by a table of byte values, in plain torch, on any device; bit for bit nvfp4.py.

A packed byte stands for two values, so one look-up gives both. Peak memory: 12 bytes per weight.
"""

from functools import cache

import torch
from torch import Tensor

from fourge.formats import e2m1, fp8
from fourge.formats.layout import BLOCK_SIZE
from fourge.formats.nvfp4 import NVFP4Tensor, expanded


def dequantize(q: NVFP4Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """As nvfp4.dequantize."""
    out = expanded(q, dtype, out)
    num_rows, num_bytes = q.weight.shape
    values_NK = _pairs(q.weight.device)[q.weight.int()].view(num_rows, 2 * num_bytes)
    divisor_NB = fp8.from_e4m3(q.weight_scale) * q.weight_scale_2
    values_NBS = values_NK.unflatten(-1, (-1, BLOCK_SIZE)).mul_(divisor_NB.unsqueeze(-1))
    return out.copy_(values_NBS.flatten(-2))


@cache
def _pairs(device: torch.device) -> Tensor:
    """float32 [256, 2]: the values of both codes of every byte."""
    every_byte = torch.arange(256, dtype=torch.uint8, device=device)
    return e2m1.decode(e2m1.unpack(every_byte[:, None]))
