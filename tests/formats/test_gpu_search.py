"""The Triton kernels of the search against the reference on the CPU, bit for bit."""

import pytest
import torch

from fourge.formats import kernels, search
from search_cases import KINDS, SHAPES, make_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 1024)])
def test_kernel_and_reference_find_the_same_scales(shape: tuple[int, int], kind: str):
    case = make_case(shape, kind)
    found = kernels.search_scales(*(one.cuda() for one in case))
    assert torch.equal(found.cpu().view(torch.uint8), search.search_scales(*case).view(torch.uint8))


@pytest.mark.parametrize("rows", [1, 64, 65, 1000])
def test_kernel_and_reference_descend_alike(rows: int):
    x, scale_2, factor = make_case((rows, 16), "full", rows)
    measure = (factor @ factor.mT)[0].contiguous()
    scales = search.search_scales(x, scale_2, factor)[:, 0]
    given = (one.cuda() for one in (x, scales, scale_2, measure))
    ours, theirs = kernels.descend(*given), search.descend(x, scales, scale_2, measure)
    assert torch.equal(ours.value_NS.cpu(), theirs.value_NS)
    assert torch.equal(ours.loss_N.cpu(), theirs.loss_N)


def test_rounding_to_given_scales_is_that_of_the_cpu():
    x, scale_2, factor = make_case((65, 144), "full")
    scales = search.search_scales(x, scale_2, factor)
    ours = kernels.round_to(x.cuda(), scales.cuda(), scale_2.cuda())
    assert torch.equal(ours.weight.cpu(), search.round_to(x, scales, scale_2).weight)
