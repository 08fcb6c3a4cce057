"""E2M1, the 4-bit float of NVFP4: the one rounding of fourge, and nibble packing.

A code is sign << 3 | index; the index counts the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6. Rounding
is to nearest, ties to the even index, saturating at 6, as nvidia-modelopt 0.47 does it. It knows
no scale: its input is already divided (nvfp4.py).

Shape suffixes: K weights of a row, P = K/2 bytes of packed codes.
"""

import torch
from torch import Tensor

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MAX = 6.0
# The midpoints between neighbours; one that lies above an even index is passed only by more.
THRESHOLDS = (
    (0.25, torch.gt),
    (0.75, torch.ge),
    (1.25, torch.gt),
    (1.75, torch.ge),
    (2.5, torch.gt),
    (3.5, torch.ge),
    (5.0, torch.gt),
)


def encode(x: Tensor) -> Tensor:
    """Codes (uint8, 0..15) of float32 values of any shape.

    A negative value that rounds to zero gets code 8 (minus zero), -0.0 itself gets 0. NaN passes
    no threshold and gets 0; refuse it before.
    """
    magnitude = x.abs()
    index = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for threshold, passes in THRESHOLDS:
        index += passes(magnitude, threshold)
    sign = (x < 0).to(torch.uint8)
    return sign << 3 | index


def decode(codes: Tensor) -> Tensor:
    """float32 values of uint8 codes 0..15; code 8 is -0.0. IndexError for a larger code."""
    values = torch.tensor(
        [*MAGNITUDES, *(-m for m in MAGNITUDES)], dtype=torch.float32, device=codes.device
    )
    return values[codes.long()]


def pack(codes_K: Tensor) -> Tensor:
    """Two codes to a byte along the last dimension: even k in the low nibble, odd k in the high.

    [..., K] uint8 -> [..., K/2] uint8. ValueError: K is odd.
    """
    if codes_K.shape[-1] % 2:
        raise ValueError(
            f"the last dimension must be even to pack pairs; got {tuple(codes_K.shape)}"
        )
    return codes_K[..., 1::2] << 4 | codes_K[..., 0::2]


def unpack(packed_P: Tensor) -> Tensor:
    """The codes of packed bytes: [..., P] uint8 -> [..., 2 P] uint8."""
    return torch.stack((packed_P & 0xF, packed_P >> 4), dim=-1).flatten(-2)
