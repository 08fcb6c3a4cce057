"""On a GPU: the logits of the expanded model and of the CPU, with experts packed there too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fourge.transformers as subject

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Load = Callable[..., Any]
Tokens = Callable[..., torch.Tensor]
TOLERANCE = 1e-4  # float32, other orders of summation
SHORT, LONG = 20, 80  # index_topk is 32


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits[0].cpu()


def test_logits_are_those_of_the_expanded_model(
    any_checkpoint: Path,
    load: Load,
    tokens: Tokens,
    expand: Callable[[Path, Path], Path],
    tmp_path: Path,
):
    model = load(any_checkpoint).to("cuda")
    assert {tensor.device.type for tensor in model.parameters()} == {"cuda"}
    expanded = load(expand(any_checkpoint, tmp_path / "expanded")).to("cuda")
    for length in (SHORT, LONG):
        ids = tokens(length).cuda()
        assert (logits(model, ids) - logits(expanded, ids)).abs().max() < TOLERANCE


def test_logits_are_those_of_the_cpu(any_checkpoint: Path, load: Load, tokens: Tokens):
    """Up to index_topk: beyond, transformers' indexers settle ties in another way on a GPU."""
    model, ids = load(any_checkpoint), tokens(SHORT)
    expected = logits(model, ids)
    assert (logits(model.to("cuda"), ids.cuda()) - expected).abs().max() < TOLERANCE


def test_experts_may_wait_in_host_memory(checkpoint: Path, load: Load, tokens: Tokens):
    pytest.importorskip("accelerate")
    places = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"], 0)
    places |= {"model.layers.0": 0, "model.layers.1": "cpu", "model.layers.2": 0}
    model, ids = load(checkpoint, device_map=places), tokens(LONG).cuda()
    experts = model.model.layers[1].mlp.experts
    assert {tensor.device.type for tensor in experts.parameters()} == {"meta"}
    expected = logits(load(checkpoint).to("cuda"), ids)
    assert (logits(model, ids) - expected).abs().max() < TOLERANCE


def test_one_projection_at_a_time_is_expanded():
    """Of GLM-5.1's shape; 14 bytes per weight, and the activations of a few tokens."""
    shape = (2048, 6144)
    with torch.device("cuda"):
        expert = subject.PackedExpert(
            subject.PackedLinear(shape, ()),
            subject.PackedLinear(shape, ()),
            subject.PackedLinear(shape[::-1], ()),
        )
        experts = subject.PackedExperts([expert])
    for tensor in experts.parameters():
        tensor.copy_(torch.ones_like(tensor))
    x = torch.randn(8, 6144, dtype=torch.bfloat16, device="cuda")
    chosen = torch.zeros(8, 1, dtype=torch.int64, device="cuda")
    experts(x, chosen, torch.ones(8, 1, device="cuda"))  # what the libraries keep
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    experts(x, chosen, torch.ones(8, 1, device="cuda"))
    assert torch.cuda.memory_allocated() == held
    assert torch.cuda.max_memory_allocated() - held < 14.5 * shape[0] * shape[1]
