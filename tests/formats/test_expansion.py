"""Expanding, rounding activations and comparing: fast paths against the readable ones."""

import math

import pytest
import torch

from fourge.formats import kernels, nvfp4
from fourge.formats.kernels import lookup
from fourge.formats.nvfp4 import NVFP4Tensor

SHAPES = [(1, 16), (7, 48), (64, 1024)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def any_tensor(n: int, k: int, seed: int, scale_2: float) -> NVFP4Tensor:
    """Every code and every block scale, NaN included."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (n, k // 2), generator=generator).byte()
    scales = torch.randint(0, 256, (n, k // 16), generator=generator).byte()
    return NVFP4Tensor(packed, scales.view(torch.float8_e4m3fn), torch.tensor(scale_2))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the sign of zero; NaN equals NaN."""
    assert a.dtype == b.dtype
    nan = a.isnan()
    signs = torch.equal(a[~nan].signbit(), b[~nan].signbit())
    return bool(torch.equal(nan, b.isnan()) and torch.equal(a[~nan], b[~nan]) and signs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_2", [1.0, 3.7e-5, 1e-39, 2e35])
@pytest.mark.parametrize("shape", SHAPES)
def test_expansion_is_that_of_the_reference(shape, scale_2, dtype):
    q = any_tensor(*shape, seed=0, scale_2=scale_2)
    expected = nvfp4.dequantize(q, dtype)
    assert same_bits(kernels.dequantize(q, dtype), expected)
    assert same_bits(lookup.dequantize(q, dtype), expected)


def test_expansion_writes_into_what_is_given():
    q = any_tensor(4, 32, seed=1, scale_2=0.5)
    out = torch.empty(4, 32, dtype=torch.bfloat16)
    assert kernels.dequantize(q, torch.bfloat16, out) is out
    assert same_bits(out, nvfp4.dequantize(q, torch.bfloat16))
    strided = torch.zeros(4, 64)[:, ::2]
    assert same_bits(kernels.dequantize(q, torch.float32, strided), nvfp4.dequantize(q))
    with pytest.raises(ValueError, match="out must be"):
        kernels.dequantize(q, torch.float32, torch.empty(4, 16))
    with pytest.raises(ValueError, match="do not fit"):
        kernels.dequantize(q._replace(weight_scale=q.weight_scale[:, :1]))
    with pytest.raises(ValueError, match="dtype must be"):
        kernels.dequantize(q, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("input_scale", [1.0, 0.0036, 1e-6, 300.0])
def test_activations_are_rounded_as_the_reference_does(input_scale, dtype):
    generator = torch.Generator().manual_seed(0)
    magnitude = torch.exp2(torch.randint(-14, 14, (50, 8, 1), generator=generator).float())
    x = (torch.randn(50, 8, 16, generator=generator) * magnitude).flatten(1).to(dtype)
    x[3] = 0
    scale = torch.tensor(input_scale)
    found = kernels.quantize_activations(x, scale)
    assert same_bits(found, nvfp4.quantize_activations(x, scale))


def test_activations_on_the_grid_stay_and_others_go_to_the_nearest():
    x = torch.tensor([6.0, 0.5, -1.5, 2.4, 2.5, 3.5, 5.0, -0.2, 0.25, 0.75, 1.25, 1.75, 0, 4, 3, 1])
    wanted = torch.tensor([6.0, 0.5, -1.5, 2, 2, 4, 4, -0.0, 0, 1, 1, 2, 0, 4, 3, 1])
    assert same_bits(kernels.quantize_activations(x, torch.tensor(1.0)), wanted)


def test_quiet_blocks_become_zeros_and_loud_ones_saturate():
    """Below 6 * 2^-10 * input_scale there is no block scale left; above 2688 of them no larger."""
    quiet = torch.full((16,), 6 * 2.0**-10)
    assert not kernels.quantize_activations(quiet, torch.tensor(1.0)).any()
    heard = torch.full((16,), 6 * 2.0**-10 * 1.01)
    assert kernels.quantize_activations(heard, torch.tensor(1.0)).all()
    loud = torch.full((16,), 5000.0)
    assert (kernels.quantize_activations(loud, torch.tensor(1.0)) == 2688).all()


def test_a_ragged_block_of_activations_is_refused():
    for function in (kernels.quantize_activations, nvfp4.quantize_activations):
        with pytest.raises(ValueError, match="multiple of 16"):
            function(torch.ones(3, 24), torch.tensor(1.0))


def test_error_sums_are_those_of_the_reference(make_weights):
    for seed in (0, 3, 6):
        w = make_weights(33, 64, seed)
        q = nvfp4.quantize(w, nvfp4.weight_scale_2(nvfp4.amax(w)))
        for fast, readable in zip(kernels.compare(w, q), nvfp4.compare(w, q), strict=True):
            assert fast == pytest.approx(readable, rel=1e-12)


def test_error_sums_tell_the_relative_error():
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    q = kernels.quantize(w, nvfp4.weight_scale_2(kernels.amax(w)))
    sums = kernels.compare(w, q)
    assert math.sqrt(sums.error_square / sums.square) == pytest.approx(0.095, abs=0.01)
    cosine = sums.product / math.sqrt(sums.square * sums.quantized_square)
    assert 0.994 < cosine < 0.998
    with pytest.raises(ValueError, match="packed tensor's shape"):
        kernels.compare(w[:, :128], q)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 1024)])
def test_scale_bytes_are_counted_as_the_reference_does(shape):
    generator = torch.Generator().manual_seed(2)
    stored = torch.randint(0, 256, shape, generator=generator).byte()
    scales = stored.view(torch.float8_e4m3fn)
    counts = kernels.count_scales(scales)
    assert counts == nvfp4.count_scales(scales)
    assert counts[stored[0, 0]] == (stored == stored[0, 0]).sum()
    assert sum(counts) == stored.numel()
    assert kernels.count_scales(scales.T) == counts
