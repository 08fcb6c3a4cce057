"""E4M3 (torch.float8_e4m3fn), the 8-bit float of block scales: casts to and from float32.

Sign, 4 exponent bits of bias 7, 3 mantissa bits; no infinity, 0x7F and 0xFF are NaN. Knows no
clamp and no scale: both belong to the format that uses it.
"""

import torch
from torch import Tensor

MAX = 448.0  # 0x7E
SMALLEST = 2.0**-9  # 0x01, subnormal


def to_e4m3(x: Tensor) -> Tensor:
    """float32 -> float8_e4m3fn, to nearest, ties to even; the caller keeps x within [2^-9, 448]."""
    return x.to(torch.float8_e4m3fn)


def from_e4m3(x: Tensor) -> Tensor:
    """float8_e4m3fn -> float32, exact."""
    return x.to(torch.float32)
