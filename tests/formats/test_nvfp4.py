"""The readable quantizer against golden bytes of nvidia-modelopt, and its edges."""

import math

import pytest
import torch

from fourge.formats import nvfp4
from fourge.formats.nvfp4 import NVFP4Tensor


def test_the_bytes_equal_those_of_modelopt(golden, assert_same_bytes):
    scale_2 = nvfp4.weight_scale_2(golden.amax)
    assert_same_bytes(nvfp4.quantize(golden.w, scale_2), golden.expected)


def test_gate_and_up_share_the_larger_amax(load_golden):
    gate, up = load_golden("pair_gate"), load_golden("pair_up")
    amax = max(nvfp4.amax(gate.w), nvfp4.amax(up.w))
    assert gate.amax == up.amax == amax
    assert nvfp4.amax(gate.w) < amax
    assert gate.expected.weight_scale.float().max() < 448 == up.expected.weight_scale.float().max()


def test_the_golden_cases_reach_the_edges_they_are_named_for(load_golden):
    def scale_bytes(name):
        return load_golden(name).expected.weight_scale.view(torch.uint8)

    clamps = scale_bytes("scales_at_both_clamps")
    assert (clamps.min(), clamps.max()) == (0x01, 0x7E)
    assert (scale_bytes("zero_blocks")[3] == 0x38).all()
    wide = scale_bytes("wide_range")
    assert (wide[0] == 0x38).all(), "the ratio underflows to 0 and becomes 1"
    assert (wide[100] == 0x01).all(), "the ratio is clamped"
    row = load_golden("element_ties").expected.weight[:2, 8:13]
    assert row[0].tolist() == [0x07, 0x22, 0x44, 0x66, 0x00]
    assert row[1].tolist() == [0x87, 0xAA, 0xCC, 0xEE, 0x08]


def test_input_scales_equal_those_of_modelopt(golden_input_scales):
    for amax, expected in zip(*golden_input_scales.values(), strict=True):
        got = nvfp4.input_scale(amax.item())
        assert got.shape == ()
        assert torch.equal(got.view(torch.int32), expected.view(torch.int32)), amax


def test_an_input_never_seen_gets_the_scale_of_amax_6():
    assert nvfp4.input_scale(0.0).item() == nvfp4.input_scale(math.nan).item()
    assert nvfp4.input_scale(0.0).item() == pytest.approx(0.00223214, rel=1e-5)


def test_an_all_zero_tensor_gets_finite_scales_and_zero_codes():
    w = torch.zeros(3, 32, dtype=torch.bfloat16)
    scale_2 = nvfp4.weight_scale_2(nvfp4.amax(w))
    q = nvfp4.quantize(w, scale_2)
    assert q.weight_scale_2.item() == pytest.approx(1 / 2688)
    assert (q.weight_scale.view(torch.uint8) == 0x38).all()
    assert (q.weight == 0).all()
    assert torch.equal(nvfp4.dequantize(q), torch.zeros(3, 32))


def test_the_largest_block_scale_is_448(make_weights):
    for seed in range(12):
        w = make_weights(9, 64, seed)
        q = nvfp4.quantize(w, nvfp4.weight_scale_2(nvfp4.amax(w)))
        assert q.weight_scale.float().max() == 448


def test_amax_is_exact_and_shows_what_is_not_finite():
    w = torch.tensor([[1.0, -3.0], [2.0, -0.0]], dtype=torch.bfloat16)
    assert nvfp4.amax(w) == 3.0
    w[1, 0] = -math.inf
    assert nvfp4.amax(w) == math.inf
    w[0, 0] = math.nan
    assert math.isnan(nvfp4.amax(w))


@pytest.mark.parametrize("w", [torch.ones(2), torch.empty(0, dtype=torch.bfloat16)])
def test_amax_refuses_other_dtypes_and_nothing(w):
    with pytest.raises(ValueError, match=r"needs bfloat16 weights and at least one; got torch\."):
        nvfp4.amax(w)


@pytest.mark.parametrize("scale", [nvfp4.weight_scale_2, nvfp4.input_scale])
@pytest.mark.parametrize("amax", [math.inf, -1.0])
def test_a_scale_of_a_senseless_amax_is_refused(scale, amax):
    with pytest.raises(ValueError, match="amax must be finite and not negative; got"):
        scale(amax)


def test_a_weight_scale_of_nan_is_refused():
    with pytest.raises(ValueError, match="got nan"):
        nvfp4.weight_scale_2(math.nan)


def test_dequantize_multiplies_code_block_scale_and_scale_2():
    q = NVFP4Tensor(
        torch.tensor([[0x21, 0xF7] + [0] * 6 + [0x0A] + [0] * 7], dtype=torch.uint8),
        torch.tensor([[2.0, 0.5]]).to(torch.float8_e4m3fn),
        torch.tensor(0.25),
    )
    expected = torch.zeros(1, 32)
    expected[0, :4] = torch.tensor([0.5, 1.0, 6.0, -6.0]) * 0.5
    expected[0, 16] = -1.0 * 0.125
    assert torch.equal(nvfp4.dequantize(q), expected)
    assert nvfp4.dequantize(q, torch.bfloat16).dtype == torch.bfloat16


def test_the_error_of_an_element_is_at_most_a_sixth_of_its_block(make_weights):
    w = make_weights(16, 256, 0)
    q = nvfp4.quantize(w, nvfp4.weight_scale_2(nvfp4.amax(w)))
    error = (nvfp4.dequantize(q) - w.float()).abs().unflatten(-1, (-1, 16))
    amax = w.float().abs().unflatten(-1, (-1, 16)).amax(-1, keepdim=True)
    # Half of the gap 4..6, and 1/16 for the rounding of the block scale.
    assert (error <= amax / 6 * (1 + 1 / 16)).all()
    assert error.max() > 0


def test_a_quantized_tensor_quantizes_to_the_same_values(make_weights):
    w = make_weights(5, 64, 0)
    scale_2 = torch.tensor(2.0**-12)
    once = nvfp4.dequantize(nvfp4.quantize(w, scale_2))
    again = nvfp4.dequantize(nvfp4.quantize(once.bfloat16(), scale_2))
    assert torch.equal(once, once.bfloat16().float())
    assert torch.equal(once, again)


@pytest.mark.parametrize(
    ("w", "scale_2", "message"),
    [
        (torch.ones(2, 16), torch.tensor(1.0), "got torch.float32"),
        (torch.ones(16).bfloat16(), torch.tensor(1.0), r"got torch.bfloat16 \(16,\)"),
        (torch.ones(2, 40).bfloat16(), torch.tensor(1.0), r"multiple of 16; got shape \(2, 40\)"),
        (torch.ones(2, 16).bfloat16(), torch.ones(1), r"scale_2 must be float32 \[\]; got"),
        (torch.ones(2, 16).bfloat16(), torch.tensor(1.0).double(), "got torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused(w, scale_2, message):
    with pytest.raises(ValueError, match=message):
        nvfp4.quantize(w, scale_2)
