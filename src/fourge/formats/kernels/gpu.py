"""NVFP4 on one CUDA device, in Triton; bit for bit nvfp4.py.

Rounding is IEEE by construction: tl.div_rn (plain / compiles to the approximate div.full.f32),
no multiplication that meets an addition (no fused multiply-add), and integer arithmetic for
bfloat16 and E4M3. Triton keeps float32 subnormals (no .ftz in the PTX of 3.6); very small blocks
depend on it. The size is a runtime argument: one compile serves all shapes.
Runs on the current stream of w's device. Reads pairs of weights (pairs.py).

Suffixes: B blocks of 16 weights, P the 8 pairs of a block.
"""

# Triton may not be installed; where it is, its types are those of its compiler, not of kernels.
# pyright: reportMissingImports=false, reportArgumentType=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourge.formats.kernels.pairs import as_pairs
from fourge.formats.nvfp4 import NVFP4Tensor, check_amax_input, outputs

PAIRS = 8  # per block of 16
TILE_BLOCKS = 128  # per program of _quantize
TILE_WORDS = 8192  # per program of _max_magnitude


def amax(w: Tensor) -> float:
    """As nvfp4.amax; waits for the device."""
    check_amax_input(w)
    words = w.detach().contiguous().view(torch.int16)
    largest = torch.zeros((), dtype=torch.int32, device=w.device)
    grid = (triton.cdiv(words.numel(), TILE_WORDS),)
    with torch.cuda.device_of(w):
        _max_magnitude[grid](  # pyright: ignore[reportIndexIssue]
            words, largest, words.numel(), TILE_WORDS
        )
    return (largest << 16).view(torch.float32).item()


def quantize(w: Tensor, scale_2: Tensor, out: NVFP4Tensor | None = None) -> NVFP4Tensor:
    """As nvfp4.quantize; does not wait for the device. scale_2 may lie on the CPU."""
    out = outputs(w, scale_2, out)
    pairs = as_pairs(w)
    num_blocks = out.weight_scale.numel()
    grid = (triton.cdiv(num_blocks, TILE_BLOCKS),)
    if num_blocks:
        with torch.cuda.device_of(w):
            _quantize[grid](  # pyright: ignore[reportIndexIssue]
                pairs,
                out.weight_scale_2,
                out.weight,
                out.weight_scale.view(torch.uint8),
                num_blocks,
                TILE_BLOCKS,
                PAIRS,
            )
    return out


@triton.jit(do_not_specialize=["num_words"])
def _max_magnitude(words, largest, num_words, TILE: tl.constexpr):
    """largest (int32, starts at 0): the largest bfloat16 bits without sign; NaN is above all."""
    w = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    bits = tl.load(words + w, mask=w < num_words, other=0).to(tl.int32) & 0x7FFF
    tl.atomic_max(largest, tl.max(bits, axis=0))


@triton.jit(do_not_specialize=["num_blocks"])
def _quantize(pairs, scale_2, packed, scales, num_blocks, TILE: tl.constexpr, PAIRS: tl.constexpr):
    b = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    bp = b[:, None] * PAIRS + tl.arange(0, PAIRS)[None, :]
    b_inside = b < num_blocks
    bp_inside = b_inside[:, None]

    pair_BP = tl.load(pairs + bp, mask=bp_inside, other=0).to(tl.uint32, bitcast=True)
    even_BP = pair_BP << 16
    odd_BP = pair_BP & 0xFFFF0000
    # Without sign, bits order as the values do, and signed integers as unsigned ones.
    magnitude_BP = tl.maximum(even_BP & 0x7FFFFFFF, odd_BP & 0x7FFFFFFF).to(tl.int32, bitcast=True)
    amax_B = tl.max(magnitude_BP, axis=1).to(tl.float32, bitcast=True)

    s2 = tl.load(scale_2)
    ratio_B = tl.div_rn(amax_B, tl.full((TILE,), 6.0, tl.float32) * s2)
    code_B = _to_e4m3(ratio_B.to(tl.int32, bitcast=True))
    tl.store(scales + b, code_B.to(tl.uint8), mask=b_inside)

    divisor_B = _from_e4m3(code_B) * s2
    divisor_BP = tl.broadcast_to(divisor_B[:, None], (TILE, PAIRS))
    low_BP = _encode(tl.div_rn(even_BP.to(tl.float32, bitcast=True), divisor_BP))
    high_BP = _encode(tl.div_rn(odd_BP.to(tl.float32, bitcast=True), divisor_BP))
    tl.store(packed + bp, (high_BP << 4 | low_BP).to(tl.uint8), mask=bp_inside)


@triton.jit
def _encode(x):
    """e2m1.encode of float32."""
    magnitude = tl.abs(x)
    index = (magnitude > 0.25).to(tl.int32)
    index += (magnitude >= 0.75).to(tl.int32)
    index += (magnitude > 1.25).to(tl.int32)
    index += (magnitude >= 1.75).to(tl.int32)
    index += (magnitude > 2.5).to(tl.int32)
    index += (magnitude >= 3.5).to(tl.int32)
    index += (magnitude > 5.0).to(tl.int32)
    return (x < 0.0).to(tl.int32) << 3 | index


@triton.jit
def _to_e4m3(bits):
    """Block scale byte of non-negative float32 bits: 0 -> 1.0, clamp to [2^-9, 448], nearest even.

    Non-negative floats order as their bits do, so that the clamp needs no float.
    """
    bits = tl.where(bits == 0, 0x3F800000, bits)
    bits = tl.minimum(tl.maximum(bits, 0x3B000000), 0x43E00000)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Subnormal, in steps of 2^-9: the spacing of float32 at 2^14, so that the addition rounds.
    shifted = bits.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(bits >= 0x3C800000, normal, subnormal)


@triton.jit
def _from_e4m3(code):
    """float32 of a positive E4M3 code, exact."""
    normal = ((code << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    subnormal = code.to(tl.float32) * 0.001953125
    return tl.where(code >= 8, normal, subnormal)
