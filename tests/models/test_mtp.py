"""The MTP step against transformers' decoder layer, driven by hand, since it has no MTP itself."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fourge.models.layer import rope_table
from fourge.models.mtp import mtp_forward

HIDDEN = 64


@pytest.fixture(scope="module", params=["glm_moe_dsa", "glm4_moe_lite", "deepseek_v32"])
def step(request: pytest.FixtureRequest, make_twin: Callable[..., Any]) -> dict[str, Any]:
    """A model whose last layer stands for the MTP layer, with inputs for it."""
    twin = make_twin(request.param)
    last = twin.config.num_hidden_layers - 1
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weights = twin.layer_weights(last) | {
        "enorm.weight": random(HIDDEN),
        "hnorm.weight": random(HIDDEN),
        "shared_head.norm.weight": random(HIDDEN),
        "eh_proj.weight": random(HIDDEN, 2 * HIDDEN) * 0.1,
    }
    config = replace(
        twin.config,
        num_hidden_layers=last,
        num_nextn_predict_layers=1,
        indexer_types=twin.config.indexer_types[:last],
        mlp_types=twin.config.mlp_types[:last],
    )
    return {
        "config": config,
        "weights": weights,
        "model": twin.reference.model,
        "hidden": random(80, HIDDEN),
        "embedding": random(80, HIDDEN),
    }


def theirs(step: dict[str, Any], rows: slice) -> torch.Tensor:
    model, weights = step["model"], step["weights"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        module = type(model.norm)(HIDDEN, eps=step["config"].rms_norm_eps)
        module.weight.data = weights[name]
        return module(x)

    embedding, hidden = step["embedding"][rows], step["hidden"][rows]
    joint = torch.cat([norm(embedding, "enorm.weight"), norm(hidden, "hnorm.weight")], -1)
    residual = (joint @ weights["eh_proj.weight"].T)[None]
    length = residual.shape[1]
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    positions = torch.arange(length)[None]
    out = model.layers[step["config"].num_hidden_layers](
        residual,
        attention_mask=mask,
        position_ids=positions,
        position_embeddings=model.rotary_emb(residual, positions),
    )
    out = out[0] if isinstance(out, tuple) else out
    return norm(out.reshape(length, HIDDEN), "shared_head.norm.weight")


def ours(step: dict[str, Any], embedding: str, hidden: str) -> torch.Tensor:
    rope = rope_table(step["config"], 80, "cpu")
    return mtp_forward(
        step[hidden], step[embedding], [60, 20], step["weights"], step["config"], rope
    )


@torch.no_grad()
def test_the_step_equals_transformers_layer_above_and_below_index_topk(
    step: dict[str, Any], logits_tolerance: float
) -> None:
    out = ours(step, "embedding", "hidden")
    for rows in (slice(0, 60), slice(60, 80)):
        assert (out[rows] - theirs(step, rows)).abs().max() < logits_tolerance


@torch.no_grad()
def test_the_embedding_comes_first(step: dict[str, Any]) -> None:
    swapped = ours(step, "hidden", "embedding")
    assert (swapped - ours(step, "embedding", "hidden")).abs().max() > 0.1


@torch.no_grad()
def test_the_result_is_normed_once_and_can_be_recycled(step: dict[str, Any]) -> None:
    out = ours(step, "embedding", "hidden")
    unweighted = out / step["weights"]["shared_head.norm.weight"]
    assert torch.allclose(unweighted.square().mean(-1), torch.ones(80), atol=1e-3)
    again = ours(step | {"recycled": out}, "embedding", "recycled")
    assert again.shape == out.shape
    assert again.isfinite().all()
