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


def weight_scale_2(amax: float, amax_range: float = AMAX_RANGE) -> Tensor:
    """float32 []: amax / 2688; for an amax of 0 the safe 1/2688, where ModelOpt writes 0 and NaN.

    ``amax_range``: the largest magnitude at a scale of 1, 2688 unless block scales keep headroom.

    ValueError: amax is negative or not finite.
    """
    _check_scalar(amax)
    scale = torch.tensor(amax, dtype=torch.float32) / amax_range
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


def dequantize(
    q: NVFP4Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """[N, K] values in dtype: code * (block scale * scale_2), each product rounded to float32, then
    once to dtype (float32, bfloat16 or float16).

    Writes into out when given. ValueError: a dtype or shape that does not fit.
    """
    out = expanded(q, dtype, out)
    divisor_NB = fp8.from_e4m3(q.weight_scale) * q.weight_scale_2
    values_NK = e2m1.decode(e2m1.unpack(q.weight))
    return out.copy_(values_NK * divisor_NB.repeat_interleave(BLOCK_SIZE, dim=-1))


def quantize_activations(x: Tensor, input_scale: Tensor) -> Tensor:
    """x [..., K] as a four-bit multiplication sees it, in x's dtype: code * (block scale *
    input_scale), with block scales of the moment.

    Unlike a weight's, a block scale has no lower bound: a block whose largest magnitude is below
    6 * 2^-10 * input_scale becomes zeros, as in the quantization kernels of vllm 0.33.0 and sglang
    0.5.23. Above 448 * 6 * input_scale it saturates. input_scale: positive float32 [].
    ValueError: K is not a multiple of 16.
    """
    check_activations(x)
    x_BS = x.float().unflatten(-1, (x.shape[-1] // BLOCK_SIZE, BLOCK_SIZE))
    scale_B = x_BS.abs().amax(dim=-1) / (e2m1.MAX * input_scale)
    scale_B = fp8.from_e4m3(fp8.to_e4m3(scale_B.clamp(max=fp8.MAX)))
    divisor_B = (scale_B * input_scale).unsqueeze(-1)
    codes_BS = e2m1.encode(torch.where(divisor_B > 0, x_BS / divisor_B, 0.0))
    return (e2m1.decode(codes_BS) * divisor_B).flatten(-2).to(x.dtype)


class ErrorSums(NamedTuple):
    """float64 sums over a weight w and its quantized value d: what errors are made of."""

    square: float  # sum w^2
    quantized_square: float  # sum d^2
    product: float  # sum w d
    error_square: float  # sum (w - d)^2


def compare(w: Tensor, q: NVFP4Tensor) -> ErrorSums:
    """How far q is from the bfloat16 weight w [N, K] that it should stand for.

    ValueError: a dtype or shape that does not fit.
    """
    check_comparable(w, q)
    w, d = w.double(), dequantize(q).double()
    sums = (w.square().sum(), d.square().sum(), (w * d).sum(), (w - d).square().sum())
    return ErrorSums(*(value.item() for value in sums))


def count_scales(weight_scale: Tensor) -> list[int]:
    """How often each of the 256 bytes stands in block scales (float8_e4m3fn, any shape)."""
    stored = weight_scale.contiguous().view(torch.uint8).flatten()
    return torch.bincount(stored.long(), minlength=256).tolist()


def check_amax_input(w: Tensor) -> None:
    """ValueError unless w is bfloat16 and has elements; shared with the kernels."""
    if w.dtype != torch.bfloat16 or not w.numel():
        raise ValueError(
            f"amax needs bfloat16 weights and at least one; got {w.dtype} {tuple(w.shape)}"
        )


def check_comparable(w: Tensor, q: NVFP4Tensor) -> None:
    """ValueError unless q is the packed form of a weight like w; shared with the kernels."""
    if w.dtype != torch.bfloat16 or q.weight.shape != packed_shape(w.shape):
        raise ValueError(
            f"weights must be bfloat16 and of the packed tensor's shape; got {w.dtype}"
            f" {tuple(w.shape)} for codes {tuple(q.weight.shape)}"
        )


def check_activations(x: Tensor) -> None:
    """ValueError unless x divides into blocks; shared with the kernels."""
    if not x.is_floating_point() or x.shape[-1] % BLOCK_SIZE:
        raise ValueError(
            f"activations must be floating-point, of a multiple of {BLOCK_SIZE} columns; got"
            f" {x.dtype} {tuple(x.shape)}"
        )


def expanded(q: NVFP4Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """Check the arguments of dequantize; return out, or a new tensor on q's device. Shared with the
    kernels.
    """
    num_rows, num_bytes = q.weight.shape
    if q.weight_scale.shape != scale_shape((num_rows, 2 * num_bytes)):
        raise ValueError(
            f"block scales {tuple(q.weight_scale.shape)} do not fit codes {tuple(q.weight.shape)}"
        )
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16; got {dtype}")
    shape = (num_rows, 2 * num_bytes)
    if out is None:
        return torch.empty(shape, dtype=dtype, device=q.weight.device)
    if (out.dtype, tuple(out.shape), out.device) != (dtype, shape, q.weight.device):
        raise ValueError(
            f"out must be {dtype} {shape} on {q.weight.device}; got {out.dtype}"
            f" {tuple(out.shape)} on {out.device}"
        )
    return out


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
