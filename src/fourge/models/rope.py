"""Rotary position embedding, plain and yarn.

    angle(p, i) = p * theta^(-2i/R)                     rotates the pair i of a vector of R numbers
    yarn: between the dimensions that turn beta_fast and beta_slow times over the original context,
          frequencies go linearly from their own value to a factor-th of it; cos and sin are
          multiplied by attention_factor, the softmax scale by mscale(factor, mscale_all_dim)^2

Pairs are (2i, 2i+1) when interleaved, (i, i + R/2) when not (NeoX); the rotated pair stays in its
place. Follows transformers 5.23; yarn: arXiv 2309.00071, with DeepSeek's mscale.
"""

import math
from typing import NamedTuple

import torch

from fourge.models.config import ModelConfig, RopeConfig

# P position, R rotated numbers of a head, L tokens of a sequence


class RopeTable(NamedTuple):
    """cos and sin of every position and pair, float32 [P, R/2]."""

    cos_PR: torch.Tensor
    sin_PR: torch.Tensor

    def rows(self, positions: slice) -> "RopeTable":
        """The part for some positions. Raises IndexError beyond the table."""
        if positions.stop > len(self.cos_PR):
            raise IndexError(
                f"position {positions.stop - 1} is beyond a table of {len(self.cos_PR)}"
            )
        return RopeTable(self.cos_PR[positions], self.sin_PR[positions])

    def for_heads(self) -> "RopeTable":
        """The table for x [..., L, heads, R]: one row for all heads of a position."""
        return RopeTable(self.cos_PR.unsqueeze(1), self.sin_PR.unsqueeze(1))


def rope_table(config: ModelConfig, max_length: int, device: torch.device | str) -> RopeTable:
    """Table for positions 0..max_length-1, shared by attention and indexer."""
    frequency_R = _frequencies(config.rope, config.qk_rope_head_dim).to(device)
    position_P = torch.arange(max_length, dtype=torch.float32, device=device)
    angle_PR = torch.outer(position_P, frequency_R)
    factor = _attention_factor(config.rope)
    return RopeTable(angle_PR.cos() * factor, angle_PR.sin() * factor)


def rotate(x: torch.Tensor, table: RopeTable, *, interleave: bool) -> torch.Tensor:
    """Rotate x [..., L, R] by the table's L rows, in float32; returns x's dtype."""
    cos, sin = table
    x_float = x.float()
    if interleave:
        first, second = x_float[..., 0::2], x_float[..., 1::2]
    else:
        first, second = x_float.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    out = torch.stack(turned, -1).flatten(-2) if interleave else torch.cat(turned, -1)
    return out.to(x.dtype)


def softmax_factor(rope: RopeConfig) -> float:
    """What the attention scale qk_head_dim^-0.5 is multiplied by."""
    if rope.rope_type == "default" or rope.mscale_all_dim == 0:
        return 1.0
    return _mscale(rope.factor, rope.mscale_all_dim) ** 2


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _attention_factor(rope: RopeConfig) -> float:
    if rope.rope_type == "default":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _frequencies(rope: RopeConfig, size: int) -> torch.Tensor:
    """Radians per position of each pair, float32 [size/2]."""
    wavelength_R = rope.theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    own_R = 1.0 / wavelength_R
    if rope.rope_type == "default":
        return own_R

    def dimension(turns: float) -> float:
        per_turn = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return size * math.log(per_turn) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    span = high - low if high != low else 0.001
    stretched_R = ((torch.arange(size // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return own_R / rope.factor * stretched_R + own_R * (1 - stretched_R)
