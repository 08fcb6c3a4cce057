"""NVFP4 as nvidia-modelopt 0.47 computes it ("max"), in readable torch: the truth for the kernels.

value = e2m1(code) * weight_scale (E4M3, one per 16 weights of a row) * weight_scale_2 (float32,
one per tensor). Every operation is one IEEE float32 operation, rounded to nearest even; the
order of roundings below is the format, so no step may be fused or turned into a multiplication
by a reciprocal. One deliberate difference: a tensor of zeros gets finite scales.
Knows no file and no model. Peak memory of quantize: about 13 bytes per weight.

Shape suffixes: N rows (out_features), K columns (in_features), B = K/16 blocks of a row, S = 16.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fourge.formats import e2m1, fp8
from fourge.formats.layout import BLOCK_SIZE, packed_shape, scale_shape

AMAX_RANGE = e2m1.MAX * fp8.MAX  # 2688: the largest magnitude at weight_scale_2 = 1
SAFE_SCALE_2 = 1.0 / AMAX_RANGE  # of a tensor of zeros; any positive number would do


class NVFP4Tensor(NamedTuple):
    """One quantized weight, as it lies on disk."""

    weight: Tensor  # uint8 [N, K/2], even k in the low nibble
    weight_scale: Tensor  # float8_e4m3fn [N, K/16], 2^-9 .. 448
    weight_scale_2: Tensor  # float32 []


DTYPES = (torch.uint8, torch.float8_e4m3fn, torch.float32)


def amax(w: Tensor) -> float:
    """max |w| of a bfloat16 tensor of any shape, exact.

    nan if any element is NaN, else inf if any is infinite: the caller refuses both by name.
    ValueError: not bfloat16, or empty.
    """
    check_amax_input(w)
    return w.abs().max().item()


def weight_scale_2(amax: float) -> Tensor:
    """float32 []: amax / 2688; for an amax of 0 the safe 1/2688, where ModelOpt writes 0 and NaN.

    ValueError: amax is negative or not finite.
    """
    _check_scalar(amax)
    scale = torch.tensor(amax, dtype=torch.float32) / AMAX_RANGE
    return torch.where(scale == 0, SAFE_SCALE_2, scale)


def input_scale(amax: float) -> Tensor:
    """float32 []: amax / 2688 of the largest activation; amax 0 or nan (never seen) -> 6 / 2688.

    ValueError: amax is negative or infinite.
    """
    if amax == 0 or math.isnan(amax):
        amax = e2m1.MAX
    _check_scalar(amax)
    return torch.tensor(amax, dtype=torch.float32) / AMAX_RANGE


def quantize(w: Tensor, scale_2: Tensor, out: NVFP4Tensor | None = None) -> NVFP4Tensor:
    """Quantize a bfloat16 weight [N, K] with a given weight_scale_2 (positive, finite).

    Writes into out when given (contiguous, on w's device), and returns it. Elements must be
    finite (see amax). ValueError: a dtype or shape that does not fit, K not a multiple of 16.
    """
    out = outputs(w, scale_2, out)
    scale_2 = out.weight_scale_2
    w_NBS = w.unflatten(-1, (w.shape[-1] // BLOCK_SIZE, BLOCK_SIZE))
    amax_NB = w_NBS.abs().amax(dim=-1).float()
    scale_NB = amax_NB / (e2m1.MAX * scale_2)
    scale_NB = torch.where(scale_NB == 0, 1.0, scale_NB)
    scale_NB = fp8.to_e4m3(scale_NB.clamp(fp8.SMALLEST, fp8.MAX))
    divisor_NB = fp8.from_e4m3(scale_NB) * scale_2
    codes_NBS = e2m1.encode(w_NBS.float() / divisor_NB.unsqueeze(-1))
    out.weight.copy_(e2m1.pack(codes_NBS.flatten(-2)))
    out.weight_scale.copy_(scale_NB)
    return out


def dequantize(q: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[N, K] values in dtype: code * (block scale * scale_2), each product rounded to float32."""
    divisor_NB = fp8.from_e4m3(q.weight_scale) * q.weight_scale_2
    values_NK = e2m1.decode(e2m1.unpack(q.weight))
    return (values_NK * divisor_NB.repeat_interleave(BLOCK_SIZE, dim=-1)).to(dtype)


def check_amax_input(w: Tensor) -> None:
    """ValueError unless w is bfloat16 and has elements; shared with the kernels."""
    if w.dtype != torch.bfloat16 or not w.numel():
        raise ValueError(
            f"amax needs bfloat16 weights and at least one; got {w.dtype} {tuple(w.shape)}"
        )


def outputs(w: Tensor, scale_2: Tensor, out: NVFP4Tensor | None) -> NVFP4Tensor:
    """Check the arguments of quantize; return out, or new tensors on w's device, scale_2 filled in.

    Shared with the kernels. ValueError: as quantize.
    """
    if w.dtype != torch.bfloat16 or w.dim() != 2:
        raise ValueError(
            f"weights must be bfloat16 [out_features, in_features]; got {w.dtype} {tuple(w.shape)}"
        )
    if scale_2.dtype != torch.float32 or scale_2.dim() != 0:
        raise ValueError(f"scale_2 must be float32 []; got {scale_2.dtype} {tuple(scale_2.shape)}")
    shapes = (packed_shape(w.shape), scale_shape(w.shape), ())
    if out is None:
        # The scalar goes to w's device too: CUDA torch divides by a CPU scalar as a product with
        # its reciprocal, which rounds differently.
        out = NVFP4Tensor(
            *(torch.empty(s, dtype=d, device=w.device) for s, d in zip(shapes, DTYPES, strict=True))
        )
    for name, have, shape, dtype in zip(NVFP4Tensor._fields, out, shapes, DTYPES, strict=True):
        if (have.dtype, have.shape, have.device) != (dtype, shape, w.device):
            raise ValueError(
                f"out.{name} must be {dtype} {shape} on {w.device}; "
                f"got {have.dtype} {tuple(have.shape)} on {have.device}"
            )
        if not have.is_contiguous():
            raise ValueError(f"out.{name} must be contiguous; got strides {have.stride()}")
    out.weight_scale_2.copy_(scale_2)
    return out


def _check_scalar(amax: float) -> None:
    if not 0 <= amax < math.inf:
        raise ValueError(f"amax must be finite and not negative; got {amax}")
