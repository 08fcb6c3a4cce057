"""The matrix product of the house: y = x W^T, weights [out, in], BF16 or NVFP4 as stored.

On the CPU, BF16 goes through oneDNN, which compiles and keeps a kernel for every number of rows
(0.6 MB and 1 ms each, measured with torch 2.13 and oneDNN 3.12): with experts that get any number
of tokens that would be gigabytes. So rows are taken in a few fixed numbers.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from fourge.formats import kernels
from fourge.formats.nvfp4 import NVFP4Tensor
from fourge.models import chunks

# Rows go 512 at a time, the rest filled up to a multiple of 64: eight shapes in all.
MOST_ROWS = 512
ROW_STEP = 64


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[..., in] x [out, in] -> [..., out] in x's dtype; the weight is cast when it differs."""
    weight = weight.to(x.dtype)
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return F.linear(x, weight)
    return _linear_in_few_shapes(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


def weight_of(weights: Mapping[str, torch.Tensor], prefix: str, dtype: torch.dtype) -> torch.Tensor:
    """[out, in] in ``dtype`` of the weight whose tensors begin with ``prefix``: cast, or expanded
    from NVFP4 where there are block scales.
    """
    weight = weights[prefix + "weight"]
    block_scale = weights.get(prefix + "weight_scale")
    if block_scale is None:
        return weight.to(dtype)
    scale_2 = weights[prefix + "weight_scale_2"].reshape(())
    return kernels.dequantize(NVFP4Tensor(weight, block_scale, scale_2), dtype)


def _linear_in_few_shapes(x_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    out_NO = x_NI.new_empty(len(x_NI), len(weight_OI))
    for rows in chunks.slices(len(x_NI), MOST_ROWS):
        x_RI = x_NI[rows]
        num_rows = len(x_RI)
        if num_rows % ROW_STEP == 0:
            torch.mm(x_RI, weight_OI.t(), out=out_NO[rows])
        else:
            x_RI = F.pad(x_RI, (0, 0, 0, -num_rows % ROW_STEP))
            out_NO[rows] = torch.mm(x_RI, weight_OI.t())[:num_rows]
    return out_NO
