"""Scales by search: the reference finds the best, and the kernel what the reference finds."""

import pytest
import torch

from fourge.formats import e2m1, kernels, nvfp4, search
from search_cases import KINDS, SHAPES, make_case, measure_of


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def error_of(x: torch.Tensor, q: nvfp4.NVFP4Tensor, measure_BSS: torch.Tensor) -> torch.Tensor:
    """float64 [N, B]: e^T H e."""
    e = (nvfp4.dequantize(q) - x).double().unflatten(-1, (-1, 16))
    return torch.einsum("nbi,bij,nbj->nb", e, measure_BSS.double(), e)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_and_reference_find_the_same_scales(shape: tuple[int, int], kind: str):
    case = make_case(shape, kind, seed=shape[0])
    assert same_bytes(kernels.search_scales(*case), search.search_scales(*case))


@pytest.mark.parametrize("kind", ["ones", "diagonal", "full"])
def test_no_other_scale_has_less_error(kind: str):
    x, scale_2, factor = make_case((9, 32), kind)
    whole = torch.diag_embed(factor) if factor.dim() == 2 else factor
    measure = whole @ whole.mT
    found = search.search_scales(x, scale_2, factor)
    best = error_of(x, search.round_to(x, found, scale_2), measure)
    for byte in range(1, 127):
        scale = torch.full_like(found.view(torch.uint8), byte).view(torch.float8_e4m3fn)
        other = error_of(x, search.round_to(x, scale, scale_2), measure)
        assert bool((best <= other * (1 + 1e-5) + 1e-30).all()), byte


def test_max_is_never_better_and_often_worse():
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    scale_2 = nvfp4.weight_scale_2(nvfp4.amax(w))
    measure = measure_of(4, 5)
    factor = torch.linalg.cholesky(measure)
    x = w.float()
    found = search.round_to(x, search.search_scales(x, scale_2, factor), scale_2)
    ours, theirs = (error_of(x, q, measure) for q in (found, nvfp4.quantize(w, scale_2)))
    assert bool((ours <= theirs * (1 + 1e-5)).all())
    assert float(ours.sum()) < 0.8 * float(theirs.sum())


def test_a_block_of_zeros_gets_the_scale_that_max_gives_it():
    x, factor = torch.zeros(5, 32), torch.ones(2, 16)
    for found in (
        search.search_scales(x, torch.tensor(0.5), factor),
        kernels.search_scales(x, torch.tensor(0.5), factor),
    ):
        assert found.float().eq(1.0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_to_given_scales_is_that_of_the_reference(shape: tuple[int, int]):
    x, scale_2, factor = make_case(shape, "full")
    scales = search.search_scales(x, scale_2, factor)
    ours, theirs = kernels.round_to(x, scales, scale_2), search.round_to(x, scales, scale_2)
    assert torch.equal(ours.weight, theirs.weight)
    assert same_bytes(ours.weight_scale, theirs.weight_scale)


def test_every_float_near_a_code_or_a_tie_is_rounded_as_e2m1_does():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 2.0, 4.0])
    near = torch.cat([torch.nextafter(ties, ties * 0), ties, torch.nextafter(ties, ties + 9)])
    fine = torch.linspace(-7, 7, 16 * 4000 - 2 * len(near))
    x = torch.cat([near, -near, fine]).view(-1, 16)
    one = torch.ones(len(x), 1).to(torch.float8_e4m3fn)
    codes = e2m1.unpack(kernels.round_to(x, one, torch.tensor(1.0)).weight)
    assert torch.equal(codes, e2m1.encode(x))


@pytest.mark.parametrize("rows", [1, 5, 64, 129])
def test_kernel_and_reference_descend_alike(rows: int):
    for seed in range(4):
        x, scale_2, factor = make_case((rows, 16), "full", seed)
        measure = (factor @ factor.mT)[0].contiguous()
        scales = search.search_scales(x, scale_2, factor)[:, 0]
        ours = kernels.descend(x, scales, scale_2, measure)
        theirs = search.descend(x, scales, scale_2, measure)
        assert torch.equal(ours.value_NS, theirs.value_NS)
        assert torch.equal(ours.loss_N, theirs.loss_N)


def test_descending_never_raises_the_error_and_tells_it():
    x, scale_2, factor = make_case((200, 16), "full", 7)
    measure = (factor @ factor.mT)[0].contiguous()
    scales = search.search_scales(x, scale_2, factor)
    nearest = error_of(x, search.round_to(x, scales, scale_2), measure[None])[:, 0]
    value, told = search.descend(x, scales[:, 0], scale_2, measure)
    e = (value - x).double()
    reached = torch.einsum("ni,ij,nj->n", e, measure.double(), e)
    assert bool((reached <= nearest * (1 + 1e-4) + 1e-12).all())
    assert float(reached.sum()) < 0.9 * float(nearest.sum())
    torch.testing.assert_close(told.double(), reached, rtol=1e-3, atol=1e-4)
    # What it gives are values of codes: rounding them changes nothing.
    q = search.round_to(value, scales, scale_2)
    torch.testing.assert_close(nvfp4.dequantize(q), value)


@pytest.mark.parametrize(
    ("x", "factor"),
    [
        (torch.zeros(2, 32, dtype=torch.bfloat16), torch.ones(2, 16)),
        (torch.zeros(2, 24), torch.ones(2, 16)),
        (torch.zeros(2, 32), torch.ones(1, 16)),
        (torch.zeros(2, 32), torch.ones(2, 16, dtype=torch.float64)),
    ],
)
def test_what_does_not_fit_is_refused(x: torch.Tensor, factor: torch.Tensor):
    for find in (search.search_scales, kernels.search_scales):
        with pytest.raises(ValueError, match="must be"):
            find(x, torch.tensor(1.0), factor)
