"""The indexer against its formula, written out in float64 with all scores at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fourge.models import dsa
from fourge.models.rope import rope_table, rotate

LENGTH = 60


@pytest.fixture(scope="module", params=[True, False], ids=["interleaved", "half-split"])
def scored(
    request: pytest.FixtureRequest, make_twin: Callable[..., Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The selection, and the scores [L, L] that it should have been made by."""
    config = make_twin("glm_moe_dsa", indexer_rope_interleave=request.param).config
    generator = torch.Generator().manual_seed(1)
    hidden, latent, heads, size = 64, 48, config.index_n_heads, config.index_head_dim
    weights = {
        f"self_attn.indexer.{name}": torch.randn(shape, generator=generator) * 0.2
        for name, shape in {
            "wq_b.weight": (heads * size, latent),
            "wk.weight": (size, hidden),
            "k_norm.weight": (size,),
            "k_norm.bias": (size,),
            "weights_proj.weight": (heads, hidden),
        }.items()
    }
    x = torch.randn(LENGTH, hidden, generator=generator)
    query = torch.randn(LENGTH, latent, generator=generator)
    table = rope_table(config, LENGTH, "cpu")
    index = dsa.project(x[None], weights, config, table)
    (topk,) = dsa.select(query[None], index, weights, config, table)

    def front_rotated(y: torch.Tensor) -> torch.Tensor:
        own = table if y.ndim == 2 else table.for_heads()
        turned = rotate(y[..., :8].float(), own, interleave=request.param)
        return torch.cat([turned.double(), y[..., 8:]], -1)

    w = {name.removeprefix("self_attn.indexer."): t.double() for name, t in weights.items()}
    q = front_rotated((query.double() @ w["wq_b.weight"].T).unflatten(-1, (heads, size)))
    k = x.double() @ w["wk.weight"].T
    k = (k - k.mean(-1, keepdim=True)) / (k.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    k = front_rotated(k * w["k_norm.weight"] + w["k_norm.bias"])
    per_head = torch.relu(torch.einsum("thi,si->ths", q, k) * size**-0.5)
    head_weight = x.double() @ w["weights_proj.weight"].T * heads**-0.5
    return topk, torch.einsum("th,ths->ts", head_weight, per_head)


def test_the_best_earlier_positions_are_selected(
    scored: tuple[torch.Tensor, torch.Tensor],
) -> None:
    topk, scores = scored
    for position in range(LENGTH):
        count = min(32, position + 1)
        expected = scores[position, : position + 1].topk(count).indices
        assert sorted(i for i in topk[position].tolist() if i >= 0) == sorted(expected.tolist())


def test_padding_fills_only_the_rows_with_fewer_positions(
    scored: tuple[torch.Tensor, torch.Tensor],
) -> None:
    topk, _ = scored
    assert (topk == -1).sum(1).tolist() == [max(0, 31 - position) for position in range(LENGTH)]


def test_a_selection_mask_is_true_at_the_selected_positions_alone() -> None:
    topk = torch.tensor([[[0, -1], [1, -1], [0, 2]], [[0, -1], [0, 1], [1, 2]]], dtype=torch.int32)
    mask = dsa.selection_mask(topk[:, 1:3], 3)
    assert mask[0].tolist() == [[False, True, False], [True, False, True]]
    assert mask[1].tolist() == [[True, True, False], [False, True, True]]


def test_without_a_selection_the_mask_is_causal() -> None:
    mask = dsa.causal_mask(slice(1, 3), device=torch.device("cpu"))
    assert mask.tolist() == [[True, True, False], [True, True, True]]
