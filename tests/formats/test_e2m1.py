"""The one rounding, and packing."""

import pytest
import torch

from fourge.formats import e2m1

TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]


def test_ties_go_to_the_even_index():
    assert e2m1.encode(torch.tensor(TIES)).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert e2m1.encode(-torch.tensor(TIES)).tolist() == [8, 10, 10, 12, 12, 14, 14]


def test_one_float_step_beside_a_tie_decides():
    ties = torch.tensor(TIES)
    assert e2m1.encode(ties.nextafter(torch.tensor(0.0))).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert e2m1.encode(ties.nextafter(torch.tensor(9.0))).tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_every_bfloat16_goes_to_the_nearest_magnitude(every_finite_weight):
    x = every_finite_weight.float().reshape(-1)
    # Clamped, so that the differences stay exact.
    distance = (x.double().abs().clamp(max=8)[:, None] - torch.tensor(e2m1.MAGNITUDES)).abs()
    nearest = distance == distance.min(dim=1, keepdim=True).values
    # Of two nearest, one has an even index: rank even before odd.
    index = (nearest * torch.tensor([2, 1] * 4)).argmax(dim=1)
    assert torch.equal(e2m1.encode(x), (index + 8 * (x < 0)).to(torch.uint8))


def test_a_negative_that_rounds_to_zero_keeps_its_sign_and_minus_zero_does_not():
    x = torch.tensor([-0.2, -1e-45, -0.0, 0.0, 0.2])
    assert e2m1.encode(x).tolist() == [8, 8, 0, 0, 0]


def test_large_values_saturate():
    assert e2m1.encode(torch.tensor([7.0, 1e30, torch.inf, -torch.inf])).tolist() == [7, 7, 7, 15]


def test_codes_survive_decode_and_encode_except_minus_zero():
    codes = torch.arange(16, dtype=torch.uint8)
    values = e2m1.decode(codes)
    assert values.tolist()[:8] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert values.tolist()[8:] == [-v for v in values.tolist()[:8]]
    assert values.dtype == torch.float32
    assert values[8].signbit()
    assert e2m1.encode(values).tolist() == [*range(8), 0, *range(9, 16)]


def test_even_k_lies_in_the_low_nibble():
    assert e2m1.pack(torch.tensor([[1, 2, 15, 8]], dtype=torch.uint8)).tolist() == [[0x21, 0x8F]]


def test_unpack_undoes_pack():
    codes = torch.arange(256, dtype=torch.uint8).repeat(2).reshape(4, 8, 16) % 16
    assert torch.equal(e2m1.unpack(e2m1.pack(codes)), codes)
    every_byte = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(e2m1.pack(e2m1.unpack(every_byte)), every_byte)


def test_an_odd_number_of_codes_cannot_be_packed():
    with pytest.raises(ValueError, match=r"must be even to pack pairs; got \(2, 3\)"):
        e2m1.pack(torch.zeros(2, 3, dtype=torch.uint8))
