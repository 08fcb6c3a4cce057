"""The matrix product: every number of rows, and no kernel for each of them."""

import subprocess
import sys

import pytest
import torch

from fourge.models.linear import linear


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 63, 100, 511, 512, 513, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_rows(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 48).to(dtype), torch.randn(40, 48).bfloat16()
    expected = x.double() @ weight.double().T
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        linear(x, weight).double(), expected, rtol=tolerance, atol=tolerance * 5
    )


def test_leading_dimensions_are_kept() -> None:
    x, weight = torch.randn(2, 3, 5, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    assert linear(x, weight).shape == (2, 3, 5, 8)
    assert torch.equal(linear(x, weight)[1, 2], linear(x[1, 2], weight))


def test_memory_does_not_grow_with_the_numbers_of_rows_seen() -> None:
    code = """
import psutil, torch
from fourge.models.linear import linear
weight = torch.ones(256, 256).bfloat16()
def use(rows):
    linear(torch.ones(rows, 256).bfloat16(), weight)
use(1023)
before = psutil.Process().memory_info().rss
for rows in range(100, 500):
    use(rows)
print(psutil.Process().memory_info().rss - before)
"""
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(grown.stdout) < 30 << 20
