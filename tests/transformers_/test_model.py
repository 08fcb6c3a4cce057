"""The loaded model against fourge's own, and against transformers' with the expanded weights."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fourge.transformers as subject
from checkpoint_edits import Folder
from fourge.checkpoint.header import read_checkpoint
from fourge.checkpoint.names import Role, parse

Load = Callable[..., Any]
Tokens = Callable[..., torch.Tensor]
Expand = Callable[[Path, Path], Path]
# float32 logits, whose largest value is about 4: how far two correct implementations may be apart.
TOLERANCE = 5e-5
SHORT, LONG = 20, 80  # index_topk is 32
DECODER_LAYERS = 3


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[length, vocabulary]; gradients are on, as a user may leave them."""
    return model(input_ids=ids, use_cache=False).logits[0]


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None
    )


def packed_parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.named_parameters() if ".experts." in name}


def num_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


# -- what it computes -----------------------------------------------------------------------------


def test_logits_are_those_of_fourge(
    any_checkpoint: Path, load: Load, tokens: Tokens, logits_of_fourge: Callable[..., Any]
):
    model = load(any_checkpoint)
    for layer in model.model.layers:  # transformers takes 1e-6, whatever config.json says
        for name in ("q_a_layernorm", "kv_a_layernorm"):
            if getattr(layer.self_attn, name, None) is not None:
                getattr(layer.self_attn, name).variance_epsilon = model.config.rms_norm_eps
    sequences = [tokens(SHORT, 1), tokens(LONG, 2)]
    for ids, expected in zip(sequences, logits_of_fourge(any_checkpoint, sequences), strict=True):
        assert expected.abs().max() > 2
        assert (logits(model, ids) - expected).abs().max() < TOLERANCE


def test_logits_and_texts_are_those_of_the_expanded_model(
    any_checkpoint: Path, load: Load, tokens: Tokens, expand: Expand, tmp_path: Path
):
    model, expanded = load(any_checkpoint), load(expand(any_checkpoint, tmp_path / "expanded"))
    for ids in (tokens(SHORT, 1), tokens(LONG, 2)):
        assert (logits(model, ids) - logits(expanded, ids)).abs().max() < TOLERANCE
        assert torch.equal(generate(model, ids), generate(expanded, ids))


def test_a_padded_batch_generates_as_the_expanded_model_does(
    checkpoint: Path, load: Load, tokens: Tokens, expand: Expand, tmp_path: Path
):
    model, expanded = load(checkpoint), load(expand(checkpoint, tmp_path / "expanded"))
    padding = torch.zeros(1, LONG - SHORT, dtype=torch.long)
    ids = torch.cat([tokens(LONG, 1), torch.cat([padding, tokens(SHORT, 2)], dim=1)])
    made = generate(model, ids, (ids != 0).long())
    assert torch.equal(made, generate(expanded, ids, (ids != 0).long()))
    assert made[0, LONG:].unique().numel() > 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_the_expanded_model(
    dtype: torch.dtype, checkpoint: Path, load: Load, tokens: Tokens, expand: Expand, tmp_path: Path
):
    """Of the median token: in a random model rounding sends a few to other experts."""
    model = load(checkpoint, dtype=dtype)
    expanded = load(expand(checkpoint, tmp_path / "expanded"), dtype=dtype)
    ids = tokens(LONG, 1)
    found, expected = logits(model, ids), logits(expanded, ids)
    assert found.dtype == dtype
    deviation = (found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
    assert deviation.median() < 0.01


def test_activations_are_not_rounded(checkpoint: Path, own: Folder, load: Load, tokens: Tokens):
    own.map("input_scale", lambda scale: scale * 1000)
    ids = tokens(LONG, 1)
    assert torch.equal(logits(load(own.path), ids), logits(load(checkpoint), ids))


# -- what it holds --------------------------------------------------------------------------------


def test_experts_are_held_as_they_lie_on_disk(checkpoint: Path, load: Load, tokens: Tokens):
    stored = 0
    for info in read_checkpoint(checkpoint).tensors.values():
        name = parse(info.name)
        if name.role == Role.ROUTED_EXPERT and name.part != "input_scale":
            stored += info.nbytes if name.layer in range(DECODER_LAYERS) else 0
    model = load(checkpoint)
    num_weights = 2 * 6 * 3 * 64 * 32  # sparse layers, experts, projections
    assert stored == num_weights // 2 + num_weights // 16 + 4 * 2 * 6 * 3
    for _ in range(2):
        experts = packed_parameters(model)
        assert num_bytes(experts) == stored
        dtypes = {tensor.dtype for tensor in experts.values()}
        assert dtypes == {torch.uint8, torch.float8_e4m3fn, torch.float32}
        generate(model, tokens(LONG, 1))


def test_one_projection_at_a_time_is_expanded_where_tokens_are(
    checkpoint: Path, load: Load, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
):
    """Gradients are on: a graph would keep every projection that it has used."""
    expanded: list[weakref.ref[torch.Tensor]] = []
    expand = subject.weight_of

    def watched(*arguments: Any) -> torch.Tensor:
        assert all(weight() is None for weight in expanded)
        weight = expand(*arguments)
        expanded.append(weakref.ref(weight))
        return weight

    model = load(checkpoint)
    monkeypatch.setattr(subject, "weight_of", watched)
    logits(model, tokens(1))
    assert len(expanded) == 2 * 2 * 3  # sparse layers, experts per token, projections
    logits(model, tokens(LONG))
    assert len(expanded) > 2 * 2 * 3 * 2


def test_casting_the_model_leaves_the_experts_alone(checkpoint: Path, load: Load, tokens: Tokens):
    model, ids = load(checkpoint), tokens(SHORT, 1)
    before = {name: tensor.clone() for name, tensor in packed_parameters(model).items()}
    model.to(torch.bfloat16)
    for name, tensor in packed_parameters(model).items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor.float(), before[name].float()), name
    assert model.lm_head.weight.dtype == logits(model, ids).dtype == torch.bfloat16
    model.to("meta", torch.float32)
    assert {tensor.device.type for tensor in model.parameters()} == {"meta"}
    assert packed_parameters(model).keys() == before.keys()
