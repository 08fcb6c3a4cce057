"""Rows of a compressed attention cache, as vllm 0.33.0 and sglang 0.5.23 lay them out.

latent row (656 bytes in GLM-5.1): C E4M3 codes, one float32 scale for every 128 of them, R rotated
key numbers in BF16. Index keys (132 bytes a token): a page of 64 tokens holds 64 x I E4M3 codes,
then 64 float32 scales. A scale is a power of two, 2^ceil(log2(max(amax / 448, 1e-4))).
Sources: vllm 0.33.0 kernels.py:96-119, 355-386; sglang 0.5.23 mem_cache/index_key_cache.py.

Shape suffixes: C latent, R rotated, I index head size, B scales of a row, G = 128, P pages.
"""

import torch
from torch import Tensor

from fourge.formats import fp8

SCALE_GROUP = 128
PAGE_TOKENS = 64
_SMALLEST_RATIO = 1e-4


def latent_row_bytes(latent: int, rotated: int) -> int:
    """Bytes of a latent row."""
    return latent + 4 * _num_scales(latent) + 2 * rotated


def index_page_bytes(size: int) -> int:
    """Bytes of a page of index keys."""
    return PAGE_TOKENS * (size + 4)


def pack_latents(latent: Tensor, rotated: Tensor) -> Tensor:
    """[..., C] and [..., R] -> uint8 [..., row]."""
    size = latent.shape[-1]
    padded = torch.nn.functional.pad(latent.float(), (0, -size % _group(size)))
    codes_BG, scale_B = _quantize(padded.unflatten(-1, (-1, _group(size))))
    parts = (
        codes_BG.flatten(-2)[..., :size],
        scale_B.contiguous().view(torch.uint8),
        rotated.to(torch.bfloat16).contiguous().view(torch.uint8),
    )
    return torch.cat(parts, -1)


def unpack_latents(rows: Tensor, latent: int, rotated: int) -> Tensor:
    """uint8 [..., row] -> float32 [..., C + R]."""
    num_scales = _num_scales(latent)
    codes, scale, turned = rows.split([latent, 4 * num_scales, 2 * rotated], -1)
    scale_B = scale.contiguous().view(torch.float32)
    scale_C = scale_B.repeat_interleave(_group(latent), -1)[..., :latent]
    values_C = fp8.from_e4m3(codes.contiguous().view(torch.float8_e4m3fn)) * scale_C
    return torch.cat([values_C, turned.contiguous().view(torch.bfloat16).float()], -1)


def pack_index_keys(key: Tensor) -> tuple[Tensor, Tensor]:
    """[..., I] -> uint8 [..., I] and the bytes of the scales [..., 4]."""
    codes, scale = _quantize(key.float())
    return codes, scale.unsqueeze(-1).view(torch.uint8)


def unpack_index_pages(pages: Tensor, size: int) -> Tensor:
    """uint8 [P, page] -> float32 [P, 64, I]."""
    codes, scales = pages.split([PAGE_TOKENS * size, PAGE_TOKENS * 4], -1)
    values = fp8.from_e4m3(codes.contiguous().view(torch.float8_e4m3fn))
    scale = scales.contiguous().view(torch.float32)
    return values.unflatten(-1, (PAGE_TOKENS, size)) * scale.unsqueeze(-1)


def _quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (uint8) of the last dimension and its float32 scale."""
    ratio = (values.abs().amax(-1) / fp8.MAX).clamp(min=_SMALLEST_RATIO)
    scale = torch.exp2(torch.ceil(torch.log2(ratio)))
    return fp8.to_e4m3(values / scale.unsqueeze(-1)).view(torch.uint8), scale


def _group(size: int) -> int:
    return min(SCALE_GROUP, size)


def _num_scales(size: int) -> int:
    return -(-size // SCALE_GROUP)
