"""E4M3 casts against the definition of the format."""

import torch

from fourge.formats import fp8

CODES = range(0x7F)  # positive, finite


def value(code: int) -> float:
    exponent, mantissa = code >> 3, code & 7
    return mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)


def test_every_finite_code_has_its_value():
    codes = torch.tensor(CODES, dtype=torch.uint8)
    got = fp8.from_e4m3(codes.view(torch.float8_e4m3fn))
    assert got.dtype == torch.float32
    assert got.tolist() == [value(c) for c in CODES]
    assert value(0x01) == fp8.SMALLEST
    assert value(0x7E) == fp8.MAX


def test_values_round_to_nearest_and_midpoints_to_the_even_code():
    low = torch.tensor([value(c) for c in CODES[1:-1]])
    high = torch.tensor([value(c) for c in CODES[2:]])
    codes = torch.tensor(CODES[1:-1])
    middle = (low + high) / 2

    def code_of(x):
        return fp8.to_e4m3(x).view(torch.uint8).long()

    assert torch.equal(code_of(low), codes)
    assert torch.equal(code_of(middle), codes + codes % 2)
    assert torch.equal(code_of(middle.nextafter(low)), codes)
    assert torch.equal(code_of(middle.nextafter(high)), codes + 1)
