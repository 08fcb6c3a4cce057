import torch

from fourge.models.linear import linear
from fourge.models.norm import layer_norm, rms_norm


def test_rms_norm_divides_by_the_root_of_the_mean_square_plus_eps() -> None:
    x = torch.tensor([[3.0, 4.0]])
    expected = torch.tensor([[3.0, 4.0]]) / (12.5 + 0.5) ** 0.5 * torch.tensor([1.0, 2.0])
    assert torch.allclose(rms_norm(x, torch.tensor([1.0, 2.0]), 0.5), expected)


def test_layer_norm_centres_and_adds_its_bias() -> None:
    x = torch.tensor([[1.0, 3.0]])
    out = layer_norm(x, torch.tensor([2.0, 2.0]), torch.tensor([10.0, 0.0]), 3.0)
    assert torch.allclose(out, torch.tensor([[9.0, 1.0]]))


def test_norms_and_linear_return_the_dtype_of_their_input() -> None:
    x, weight = torch.randn(2, 4).bfloat16(), torch.randn(4)
    assert rms_norm(x, weight, 1e-5).dtype == torch.bfloat16
    assert layer_norm(x, weight, weight, 1e-5).dtype == torch.bfloat16
    assert linear(x, torch.randn(3, 4)).dtype == torch.bfloat16


def test_norms_of_bfloat16_are_computed_in_float32() -> None:
    x = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() * torch.rsqrt(x.double().square().mean() + 1e-5)
    # A rounding tie may fall the other way; bfloat16 arithmetic would miss hundreds.
    assert (rms_norm(x, torch.ones(4096), 1e-5) != exact.bfloat16()).sum() < 5


def test_linear_casts_the_weight_to_the_input() -> None:
    x, weight = torch.randn(5, 4), torch.randn(3, 4).bfloat16()
    assert torch.allclose(linear(x, weight), x @ weight.float().T, atol=1e-6)
