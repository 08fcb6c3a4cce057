"""Our logits against transformers' models of the same weights, in float32."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
# index_topk is 32 unless said otherwise, and the sequences have 70, 20 and 128 tokens.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "glm_moe_dsa, every layer selects": ("glm_moe_dsa", {}),
    "glm_moe_dsa, below index_topk": ("glm_moe_dsa", {"index_topk": 128}),
    "glm_moe_dsa, indexer_types": (
        "glm_moe_dsa",
        {"indexer_types": ["full", "shared", "full", "shared"]},
    ),
    "glm_moe_dsa, pattern": ("glm_moe_dsa", {"index_topk_pattern": "FSSF"}),
    "glm_moe_dsa, frequency and offset": (
        "glm_moe_dsa",
        {"index_topk_freq": 3, "index_skip_topk_offset": 1},
    ),
    "glm_moe_dsa, groups of experts": ("glm_moe_dsa", {"n_group": 4, "topk_group": 2}),
    "glm4_moe_lite": ("glm4_moe_lite", {}),
    "glm4_moe_lite, no q_lora, two shared experts": (
        "glm4_moe_lite",
        {"q_lora_rank": None, "n_shared_experts": 2},
    ),
    "glm4_moe_lite, half-split rope": ("glm4_moe_lite", {"rope_interleave": False}),
    "deepseek_v3, yarn and groups": (
        "deepseek_v3",
        {"n_group": 4, "topk_group": 2, "rope_parameters": YARN},
    ),
    "deepseek_v3, no q_lora, narrow values, gates not normed": (
        "deepseek_v3",
        {"q_lora_rank": None, "v_head_dim": 16, "norm_topk_prob": False},
    ),
    "deepseek_v32, yarn and groups": (
        "deepseek_v32",
        {"n_group": 2, "topk_group": 1, "rope_parameters": YARN},
    ),
    "deepseek_v32, eight selected": ("deepseek_v32", {"index_topk": 8}),
}


@pytest.mark.parametrize("case", CASES)
def test_packed_logits_equal_those_of_transformers(
    make_twin: Callable[..., Any],
    make_tokens: Callable[[int, int], torch.Tensor],
    logits_tolerance: float,
    case: str,
) -> None:
    family, changes = CASES[case]
    twin = make_twin(family, **changes)
    sequences = [make_tokens(70, 1), make_tokens(20, 2), make_tokens(128, 3)]
    for tokens, logits in zip(sequences, twin.our_logits(sequences), strict=True):
        expected = twin.their_logits(tokens)
        assert expected.abs().max() > 2
        assert (logits - expected).abs().max() < logits_tolerance


def test_the_selection_matters_beyond_index_topk_and_only_there(
    make_twin: Callable[..., Any], make_tokens: Callable[[int, int], torch.Tensor]
) -> None:
    """So that the cases above do prove something about the indexer."""
    few, all_of_them = make_twin("glm_moe_dsa"), make_twin("glm_moe_dsa", index_topk=128)
    tokens = make_tokens(128, 3)
    (sparse,), (dense,) = few.our_logits([tokens]), all_of_them.our_logits([tokens])
    assert (sparse[:32] - dense[:32]).abs().max() < 1e-5
    assert (sparse[64:] - dense[64:]).abs().max() > 0.1


def test_a_glm_indexer_without_its_rope_key_differs_from_transformers(
    make_twin: Callable[..., Any], make_tokens: Callable[[int, int], torch.Tensor]
) -> None:
    """Half-split, as vllm and sglang read the missing key; transformers always interleaves."""
    twin = make_twin("glm_moe_dsa", indexer_rope_interleave=False)
    tokens = make_tokens(128, 3)
    (logits,) = twin.our_logits([tokens])
    difference = (logits - twin.their_logits(tokens)).abs()
    assert difference[:32].max() < 1e-4
    assert difference[64:].max() > 0.05


@pytest.mark.parametrize("index_topk", [32, 128], ids=["selecting", "attending to all"])
def test_bfloat16_stays_close_to_float32(
    make_twin: Callable[..., Any],
    make_tokens: Callable[[int, int], torch.Tensor],
    index_topk: int,
) -> None:
    """The median token: in a random model, rounding sends a few to other experts or positions."""
    twin = make_twin("glm_moe_dsa", index_topk=index_topk)
    sequences = [make_tokens(100, 1), make_tokens(20, 2)]
    half, full = (twin.our_logits(sequences, dtype) for dtype in (torch.bfloat16, torch.float32))
    for low, high in zip(half, full, strict=True):
        assert low.dtype == torch.bfloat16
        assert torch.cosine_similarity(low.float(), high, dim=-1).median() > 0.99
