import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fourge.models.config import from_dict
from fourge.models.rope import RopeTable, rope_table, rotate, softmax_factor

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "yarn": YARN,
    "yarn as DeepSeek": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn, two mscales": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4},
    "yarn, given factor": YARN | {"attention_factor": 1.3},
    "yarn, not truncated": YARN | {"truncate": False},
}


@pytest.mark.parametrize("name", ROPES)
def test_tables_and_scale_equal_those_of_transformers(
    make_twin: Callable[..., Any], name: str
) -> None:
    twin = make_twin("deepseek_v3", num_hidden_layers=1, rope_parameters=ROPES[name])
    table = rope_table(twin.config, 300, "cpu")
    cos, sin = twin.reference.model.rotary_emb(torch.zeros(1), torch.arange(300)[None])
    half = twin.config.qk_rope_head_dim // 2
    assert table.cos_PR.shape == (300, half)
    assert torch.allclose(table.cos_PR, cos[0, :, :half], atol=1e-6, rtol=0)
    assert torch.allclose(table.sin_PR, sin[0, :, :half], atol=1e-6, rtol=0)
    scale = twin.config.qk_head_dim**-0.5 * softmax_factor(twin.config.rope)
    assert scale == pytest.approx(twin.reference.model.layers[0].self_attn.scaling, rel=1e-12)


def test_rotation_is_a_complex_product_over_pairs_and_keeps_their_places() -> None:
    torch.manual_seed(0)
    x_LR, angle = torch.randn(3, 6), torch.randn(3, 3)
    table = RopeTable(angle.cos(), angle.sin())
    turn = torch.polar(torch.ones(3, 3), angle)
    pairs = torch.view_as_real(torch.view_as_complex(x_LR.view(3, 3, 2)) * turn)
    assert torch.allclose(rotate(x_LR, table, interleave=True), pairs.flatten(1), atol=1e-6)
    halves = torch.complex(x_LR[:, :3], x_LR[:, 3:]) * turn
    expected = torch.cat([halves.real, halves.imag], 1)
    assert torch.allclose(rotate(x_LR, table, interleave=False), expected, atol=1e-6)


def test_heads_are_rotated_alike_and_the_dtype_is_kept() -> None:
    x_LHR = torch.randn(4, 2, 6).bfloat16()
    table = RopeTable(torch.rand(4, 3), torch.rand(4, 3))
    turned = rotate(x_LHR, table.for_heads(), interleave=True)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned[:, 1], rotate(x_LHR[:, 1], table, interleave=True))


def test_dot_products_depend_on_the_distance_alone(raw_config: dict[str, Any]) -> None:
    table = rope_table(from_dict(raw_config), 64, "cpu")
    query, key = torch.randn(1, 8), torch.randn(1, 8)

    def product(at: int, distance: int) -> float:
        turned = [
            rotate(x, table.rows(slice(position, position + 1)), interleave=True)
            for x, position in ((query, at + distance), (key, at))
        ]
        return float((turned[0] * turned[1]).sum())

    assert product(0, 5) == pytest.approx(product(50, 5), abs=1e-4)
    assert not math.isclose(product(0, 5), product(0, 6), abs_tol=1e-3)


def test_a_position_beyond_the_table_is_an_error(raw_config: dict[str, Any]) -> None:
    with pytest.raises(IndexError, match="position 8"):
        rope_table(from_dict(raw_config), 8, "cpu").rows(slice(4, 9))
