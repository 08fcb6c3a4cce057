"""The matrix product of the house: y = x W^T, weights [out, in] as checkpoints store them.

On the CPU, BF16 goes through oneDNN, which compiles and keeps a kernel for every number of rows
(0.6 MB and 1 ms each, measured with torch 2.13 and oneDNN 3.12): with experts that get any number
of tokens that would be gigabytes. So rows are taken in a few fixed sizes.
"""

import torch
import torch.nn.functional as F

# Falling; a rest of fewer rows than the last is padded to it.
ROW_SIZES = (512, 256, 128, 64, 32)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[..., in] x [out, in] -> [..., out] in x's dtype; the weight is cast when it differs."""
    weight = weight.to(x.dtype)
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return F.linear(x, weight)
    return _linear_in_few_shapes(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


def _linear_in_few_shapes(x_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    out_NO = x_NI.new_empty(len(x_NI), len(weight_OI))
    weight_IO, start = weight_OI.t(), 0
    for size in ROW_SIZES:
        while len(x_NI) - start >= size:
            rows = slice(start, start + size)
            torch.mm(x_NI[rows], weight_IO, out=out_NO[rows])
            start += size
    if start < len(x_NI):
        padded = x_NI.new_zeros(ROW_SIZES[-1], x_NI.shape[1])
        padded[: len(x_NI) - start] = x_NI[start:]
        out_NO[start:] = torch.mm(padded, weight_IO)[: len(x_NI) - start]
    return out_NO
