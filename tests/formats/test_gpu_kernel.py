"""The Triton kernels against golden bytes and the readable quantizer on the CPU, bit for bit."""

import math

import pytest
import torch

from fourge.formats import kernels, nvfp4
from fourge.formats.nvfp4 import NVFP4Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# A program of the kernel takes 128 blocks: one block, odd rows, below, at and above a program.
SHAPES = [(1, 16), (7, 16), (3, 48), (127, 16), (128, 16), (129, 16), (33, 272), (2048, 6144)]


def test_the_bytes_equal_those_of_modelopt(golden, assert_same_bytes):
    scale_2 = nvfp4.weight_scale_2(golden.amax)
    assert_same_bytes(kernels.quantize(golden.w.cuda(), scale_2), golden.expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_and_reference_agree_on_random_weights(shape, make_weights, assert_same_bytes):
    for seed in range(3 if shape[0] > 1000 else 9):
        w = make_weights(*shape, seed)
        amax = nvfp4.amax(w)
        assert kernels.amax(w.cuda()) == amax
        scale_2 = nvfp4.weight_scale_2(amax)
        got = kernels.quantize(w.cuda(), scale_2.cuda())
        assert got.weight.device.type == "cuda"
        assert_same_bytes(got, nvfp4.quantize(w, scale_2))


@pytest.mark.parametrize("scale_2", [1e-40, 3e-8, 1.0, 1e20, 1e35])
def test_kernel_and_reference_agree_on_every_finite_weight(
    scale_2, every_finite_weight_in_two_orders, assert_same_bytes
):
    for w in every_finite_weight_in_two_orders:
        scale = torch.tensor(scale_2)
        assert_same_bytes(kernels.quantize(w.cuda(), scale), nvfp4.quantize(w, scale))


def test_the_reference_itself_gives_the_same_bytes_on_the_gpu(golden, assert_same_bytes):
    scale_2 = nvfp4.weight_scale_2(golden.amax)
    assert_same_bytes(nvfp4.quantize(golden.w.cuda(), scale_2), golden.expected)


def test_amax_is_that_of_the_reference_for_every_finite_weight(every_finite_weight):
    for row in every_finite_weight[::8]:
        assert kernels.amax(row.cuda()) == nvfp4.amax(row)


def test_amax_shows_what_is_not_finite():
    w = torch.ones(5, 48, dtype=torch.bfloat16, device="cuda")
    w[4, 47] = -math.inf
    assert kernels.amax(w) == math.inf
    w[2, 3] = math.nan
    assert math.isnan(kernels.amax(w))


def test_strided_and_misaligned_weights_are_read_right(make_weights, assert_same_bytes):
    whole = make_weights(48, 48, 0).cuda()
    flat = make_weights(1, 16 * 33, 0).reshape(-1).cuda()
    parameter = torch.nn.Parameter(whole)
    shifted = flat[1:513].view(16, 32)
    for w in (whole.T, whole[::2], whole[:, 16:32], shifted, parameter):
        plain = w.detach().cpu().contiguous()
        scale_2 = nvfp4.weight_scale_2(kernels.amax(w))
        assert_same_bytes(kernels.quantize(w, scale_2), nvfp4.quantize(plain, scale_2))


def test_the_given_output_is_filled_and_returned(make_weights, assert_same_bytes):
    w = make_weights(6, 64, 1)
    scale_2 = nvfp4.weight_scale_2(nvfp4.amax(w))
    out = NVFP4Tensor(
        torch.full((6, 32), 0xEE, dtype=torch.uint8, device="cuda"),
        torch.zeros(6, 4, dtype=torch.float8_e4m3fn, device="cuda"),
        torch.zeros((), device="cuda"),
    )
    assert kernels.quantize(w.cuda(), scale_2, out) is out
    assert_same_bytes(out, nvfp4.quantize(w, scale_2))


def test_no_rows_make_no_bytes():
    w = torch.empty(0, 32, dtype=torch.bfloat16, device="cuda")
    assert kernels.quantize(w, torch.tensor(1.0)).weight.shape == (0, 16)


def test_an_output_on_another_device_is_refused():
    w = torch.ones(2, 32, dtype=torch.bfloat16)
    out = nvfp4.quantize(w, torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"out.weight must be .* on cuda:0; got .* on cpu"):
        kernels.quantize(w.cuda(), torch.tensor(1.0), out)
