"""Golden bytes of nvidia-modelopt, random weights, and bytewise comparison for the formats room."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fourge.formats.nvfp4 import NVFP4Tensor

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(p.stem for p in GOLDEN.glob("*.safetensors") if p.stem != "input_scale")


class Golden(NamedTuple):
    """One weight, the amax that weight_scale_2 was made from, and the bytes of nvidia-modelopt."""

    w: Tensor
    amax: float
    expected: NVFP4Tensor


@pytest.fixture(scope="session")
def load_golden() -> Callable[[str], Golden]:
    def load(name: str) -> Golden:
        path = GOLDEN / f"{name}.safetensors"
        t = load_file(path)
        with safe_open(path, "pt") as file:
            amax = json.loads(file.metadata()["made_with"])["amax"]
        return Golden(
            t["w"], amax, NVFP4Tensor(t["weight"], t["weight_scale"], t["weight_scale_2"])
        )

    return load


@pytest.fixture(params=CASES)
def golden(request: pytest.FixtureRequest, load_golden: Callable[[str], Golden]) -> Golden:
    return load_golden(request.param)


@pytest.fixture(scope="session")
def golden_input_scales() -> dict[str, Tensor]:
    return load_file(GOLDEN / "input_scale.safetensors")


@pytest.fixture(scope="session")
def assert_same_bytes() -> Callable[[NVFP4Tensor, NVFP4Tensor], None]:
    def check(got: NVFP4Tensor, expected: NVFP4Tensor) -> None:
        for name, a, b in zip(NVFP4Tensor._fields, got, expected, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            a, b = (t.cpu().reshape(-1).view(torch.uint8) for t in (a, b))
            assert torch.equal(a, b), f"{name}: {(a != b).sum().item()} bytes of {a.numel()} differ"

    return check


@pytest.fixture(scope="session")
def make_weights() -> Callable[[int, int, int], Tensor]:
    """Random bfloat16 [n, k] of a seed: narrow, wide or extreme range, some blocks of zeros."""

    def make(n: int, k: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        low, high = ((-6, -5), (-20, 4), (-140, 120))[seed % 3]
        exponents = torch.randint(low, high, (n, k // 16), generator=generator).double()
        exponents[torch.rand(n, k // 16, generator=generator) < 0.05] = -torch.inf
        w = torch.randn(n, k, generator=generator, dtype=torch.float64)
        return (w * torch.exp2(exponents).repeat_interleave(16, dim=1)).bfloat16()

    return make


@pytest.fixture(scope="session")
def every_finite_weight() -> Tensor:
    """All 65,280 finite bfloat16 values, in the order of their bits: [255, 256]."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    w = bits.view(torch.bfloat16)
    return w[w.isfinite()].reshape(255, 256)


@pytest.fixture
def every_finite_weight_in_two_orders(every_finite_weight: Tensor) -> tuple[Tensor, Tensor]:
    """As it is, and shuffled, so that blocks hold magnitudes far apart."""
    order = torch.randperm(65280, generator=torch.Generator().manual_seed(0))
    return every_finite_weight, every_finite_weight.reshape(-1)[order].reshape(255, 256)
