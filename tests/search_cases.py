"""Targets and measures of error on which kernels of the search are held against the reference."""

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """x float32 [N, K], weight_scale_2, factor of the measure."""

    x: Tensor
    scale_2: Tensor
    factor: Tensor


# Kernels take 32 or 64 rows at a time: below, at and above those.
SHAPES = [(1, 16), (7, 48), (31, 16), (32, 16), (33, 32), (64, 16), (65, 144)]
KINDS = ("ones", "diagonal", "full", "nearly singular", "tiny", "huge scale")


def measure_of(num_blocks: int, seed: int, *, samples: int = 40) -> Tensor:
    """float32 [B, 16, 16]: second moments of inputs that differ by column and depend on another."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_blocks, 16, samples, generator=generator)
    x = x * torch.exp(torch.randn(num_blocks, 16, 1, generator=generator))
    x[:, 1:] += 0.8 * x[:, :-1]
    return x @ x.mT / samples


def make_case(shape: tuple[int, int], kind: str, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed + 1)
    rows, num_blocks = shape[0], shape[1] // 16
    spread = torch.exp(2 * torch.randn(rows, num_blocks, 1, generator=generator))
    x = (torch.randn(rows, num_blocks, 16, generator=generator) * spread).flatten(1)
    x[0, :16] = 0.0
    x[-1, 3] = -0.0
    if kind == "tiny":
        x *= 1e-30
    amax = max(float(x.abs().max()), 1e-38)
    scale_2 = torch.tensor(amax / (2688 if kind != "huge scale" else 6 * 2**-7))
    if kind == "ones":
        return Case(x, scale_2, torch.ones(num_blocks, 16))
    if kind == "diagonal":
        return Case(x, scale_2, torch.rand(num_blocks, 16, generator=generator))
    few = 3 if kind == "nearly singular" else 40
    measure = measure_of(num_blocks, seed, samples=few).double() + 1e-3 * torch.eye(16)
    return Case(x, scale_2, torch.linalg.cholesky(measure).float())
