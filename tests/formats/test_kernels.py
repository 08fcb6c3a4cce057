"""The numba kernels against golden bytes and the readable quantizer, bit for bit."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fourge.formats import kernels, nvfp4
from fourge.formats.nvfp4 import NVFP4Tensor

# Chunks of the kernel hold 256 blocks: one block, odd rows, just below, at and above a chunk.
SHAPES = [(1, 16), (7, 16), (3, 48), (255, 16), (256, 16), (257, 16), (33, 272), (64, 1024)]


def test_the_bytes_equal_those_of_modelopt(golden, assert_same_bytes):
    scale_2 = nvfp4.weight_scale_2(golden.amax)
    assert_same_bytes(kernels.quantize(golden.w, scale_2), golden.expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_and_reference_agree_on_random_weights(shape, make_weights, assert_same_bytes):
    for seed in range(9):
        w = make_weights(*shape, seed)
        amax = nvfp4.amax(w) if w.any() else 0.0
        assert kernels.amax(w) == amax
        scale_2 = nvfp4.weight_scale_2(amax)
        assert_same_bytes(kernels.quantize(w, scale_2), nvfp4.quantize(w, scale_2))


@pytest.mark.parametrize("scale_2", [1e-40, 3e-8, 1.0, 1e20, 1e35])
def test_kernel_and_reference_agree_on_every_finite_weight(
    scale_2, every_finite_weight_in_two_orders, assert_same_bytes
):
    for w in every_finite_weight_in_two_orders:
        scale = torch.tensor(scale_2)
        assert_same_bytes(kernels.quantize(w, scale), nvfp4.quantize(w, scale))


def test_kernel_and_reference_agree_on_an_all_zero_tensor(assert_same_bytes):
    w = torch.zeros(3, 32, dtype=torch.bfloat16)
    scale_2 = nvfp4.weight_scale_2(kernels.amax(w))
    assert_same_bytes(kernels.quantize(w, scale_2), nvfp4.quantize(w, scale_2))


def test_amax_is_that_of_the_reference_for_every_finite_weight(every_finite_weight):
    for row in every_finite_weight:
        assert kernels.amax(row) == nvfp4.amax(row)


def test_amax_shows_what_is_not_finite():
    w = torch.ones(5, 48, dtype=torch.bfloat16)
    w[4, 47] = -math.inf
    assert kernels.amax(w) == math.inf
    w[2, 3] = math.nan
    assert math.isnan(kernels.amax(w))
    w[2, 3] = -math.nan
    assert math.isnan(kernels.amax(w))


def test_strided_and_misaligned_weights_are_read_right(make_weights, assert_same_bytes):
    whole = make_weights(48, 48, 0)
    flat = make_weights(1, 16 * 33, 0).reshape(-1)
    parameter = torch.nn.Parameter(whole)
    data = flat.view(torch.uint8).numpy().tobytes()
    odd, half = (
        torch.frombuffer(bytearray(n) + data, dtype=torch.bfloat16, offset=n) for n in (1, 2)
    )
    rows = [w[: 16 * 32].view(32, 16) for w in (flat[1:], odd, half, half[1:])]
    for w in (whole.T, whole[::2], whole[:, 16:32], parameter, *rows):
        scale_2 = nvfp4.weight_scale_2(kernels.amax(w))
        plain = w.detach().clone(memory_format=torch.contiguous_format)
        assert kernels.amax(w) == nvfp4.amax(plain)
        assert_same_bytes(kernels.quantize(w, scale_2), nvfp4.quantize(plain, scale_2))


@pytest.mark.parametrize("quantize", [nvfp4.quantize, kernels.quantize])
def test_the_given_output_is_filled_and_returned(quantize, make_weights, assert_same_bytes):
    w = make_weights(6, 64, 1)
    scale_2 = nvfp4.weight_scale_2(nvfp4.amax(w))
    buffer = torch.full((2, 6 * 36), 0xEE, dtype=torch.uint8)
    out = NVFP4Tensor(
        buffer[1, :192].view(6, 32),
        buffer[1, 192:].view(torch.float8_e4m3fn).view(6, 4),
        torch.zeros(()),
    )
    assert quantize(w, scale_2, out) is out
    assert_same_bytes(out, nvfp4.quantize(w, scale_2))
    assert (buffer[0] == 0xEE).all()


@pytest.mark.parametrize("quantize", [nvfp4.quantize, kernels.quantize])
def test_an_output_that_does_not_fit_is_refused(quantize):
    w = torch.ones(2, 32, dtype=torch.bfloat16)
    scale_2 = torch.tensor(1.0)
    good = quantize(w, scale_2)
    for bad, message in (
        (good._replace(weight=good.weight.T), r"out.weight must be torch.uint8 \(2, 16\) on cpu"),
        (good._replace(weight_scale=good.weight), "out.weight_scale must be torch.float8_e4m3fn"),
        (good._replace(weight_scale_2=torch.zeros(1)), r"out.weight_scale_2 must be .*got .*\(1,"),
        (good._replace(weight=torch.zeros(16, 2, dtype=torch.uint8).T), "must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(w, scale_2, bad)


@pytest.mark.parametrize("quantize", [nvfp4.quantize, kernels.quantize])
def test_no_rows_or_columns_make_no_bytes(quantize):
    q = quantize(torch.empty(0, 32, dtype=torch.bfloat16), torch.tensor(1.0))
    assert (q.weight.shape, q.weight_scale.shape) == ((0, 16), (0, 2))
    q = quantize(torch.empty(3, 0, dtype=torch.bfloat16), torch.tensor(1.0))
    assert (q.weight.shape, q.weight_scale.shape) == ((3, 0), (3, 0))


@pytest.mark.parametrize("quantize", [nvfp4.quantize, kernels.quantize])
def test_the_result_does_not_share_the_scale_it_was_given(quantize):
    scale_2 = torch.tensor(1.0)
    q = quantize(torch.ones(1, 16, dtype=torch.bfloat16), scale_2)
    scale_2.fill_(2.0)
    assert q.weight_scale_2.item() == 1.0


def test_many_threads_may_quantize_at_once(make_weights, assert_same_bytes):
    weights = [make_weights(64, 512, 3 * seed) for seed in range(8)]
    scale_2 = torch.tensor(1e-4)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda w: kernels.quantize(w, scale_2), weights * 4))
    for w, q in zip(weights * 4, results, strict=True):
        assert_same_bytes(q, nvfp4.quantize(w, scale_2))


def test_other_devices_and_dtypes_are_refused():
    w = torch.empty(2, 16, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match="must lie on cpu or cuda; got meta"):
        kernels.amax(w)
    with pytest.raises(ValueError, match="must lie on cpu or cuda; got meta"):
        kernels.quantize(w, torch.tensor(1.0))
    with pytest.raises(ValueError, match="needs bfloat16 weights"):
        kernels.amax(torch.ones(2))
    with pytest.raises(ValueError, match=r"multiple of 16; got shape \(2, 24\)"):
        kernels.quantize(torch.ones(2, 24).bfloat16(), torch.tensor(1.0))
