"""Shapes of the tensors that hold one NVFP4 weight; knows no dtype and no torch.

A weight [..., k] is stored as packed codes [..., k/2], one byte per two weights, and block scales
[..., k/16], one per 16 consecutive weights of the last dimension, in plain row-major order.
"""

from collections.abc import Sequence

BLOCK_SIZE = 16


def packed_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the packed codes of a weight. ValueError: last dimension not a multiple of 16."""
    *outer, in_features = _checked(shape)
    return (*outer, in_features // 2)


def scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the block scales of a weight. ValueError: last dimension not a multiple of 16."""
    *outer, in_features = _checked(shape)
    return (*outer, in_features // BLOCK_SIZE)


def _checked(shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(shape)
    if not shape or shape[-1] % BLOCK_SIZE:
        raise ValueError(
            f"in_features must be a multiple of {BLOCK_SIZE}; got shape {shape}: "
            "leave this tensor out of the quantization"
        )
    return shape
