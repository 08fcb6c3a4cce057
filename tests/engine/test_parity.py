"""Greedy tokens and logits against transformers' GlmMoeDsaForCausalLM of the same checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_models import SMALL, greedy, outputs, random_tokens, serve, write_model
from fourge.engine.engine import Engine

# index_topk is 32: contexts below it, and up to nine times above it.
LENGTHS = (1, 5, 31, 40, 100, 200, 290)
# float32 logits up to about 4: two correct implementations. A greedy token whose logit is this
# close to the best may differ.
TOLERANCE = 2e-4
SHARING: dict[str, dict[str, Any]] = {
    "every layer selects": {},
    "pattern": {"index_topk_pattern": "FSF"},
    "types": {"indexer_types": ["full", "shared", "shared"]},
    "frequency": {"index_topk_freq": 2, "index_skip_topk_offset": 1},
    "groups of experts": {"n_group": 3, "topk_group": 2},
}


@pytest.mark.parametrize("case", SHARING)
def test_greedy_tokens_are_those_of_transformers(
    case: str, tmp_path: Path, their_model: Callable[[Path], Any]
) -> None:
    folder = write_model(tmp_path, **SHARING[case])
    prompts = [random_tokens(length, length) for length in LENGTHS]
    # Chunks of 96 tokens: long prompts are cut, and mixed with others' decoding.
    engine = Engine(folder, **SMALL, max_num_batched_tokens=96)
    requests = serve(engine, prompts, greedy(logprobs=1))
    theirs = their_model(folder)
    for prompt, request in zip(prompts, requests, strict=True):
        logits = theirs(input_ids=torch.tensor([request.tokens]), use_cache=False).logits[0]
        expected = logits[len(prompt) - 1 : -1]
        chosen = expected.gather(1, torch.tensor(request.output)[:, None]).squeeze(1)
        assert len(request.output) == 12
        assert (expected.amax(-1) - chosen).max() < TOLERANCE
        logprobs = torch.tensor([one.logprob for one in request.logprobs])
        their_logprobs = expected.log_softmax(-1).gather(1, torch.tensor(request.output)[:, None])
        assert (logprobs - their_logprobs.squeeze(1)).abs().max() < TOLERANCE


def test_tokens_are_those_of_generate(model: Path, their_model: Callable[[Path], Any]) -> None:
    prompt = random_tokens(60, 7)
    (request,) = serve(Engine(model, **SMALL), [prompt], greedy(max_tokens=20))
    tokens = torch.tensor([prompt])
    expected = their_model(model).generate(
        tokens,
        attention_mask=torch.ones_like(tokens),  # token 0 pads, and may stand in the prompt
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
    )
    assert request.tokens == expected[0].tolist()


@pytest.mark.parametrize("family", ["glm4_moe_lite", "deepseek_v3", "deepseek_v32"])
def test_other_families_decode_what_one_pass_predicts(family: str, tmp_path: Path) -> None:
    """Cached decoding against the same model's prompt log probabilities of the same tokens."""
    folder = write_model(tmp_path, family=family)
    engine = Engine(folder, **SMALL, num_speculative_tokens=2)
    (request,) = serve(engine, [random_tokens(80, 3)], greedy(logprobs=0))
    again = greedy(max_tokens=1, prompt_logprobs=0)
    (whole,) = serve(engine, [request.tokens], again)
    decoded = torch.tensor([one.logprob for one in request.logprobs])
    passed = torch.tensor([one.logprob for one in whole.prompt_logprobs[80:] if one is not None])
    assert (decoded - passed).abs().max() < TOLERANCE


def test_tokens_do_not_depend_on_the_company(model: Path) -> None:
    prompts = [random_tokens(length, length) for length in (3, 33, 64, 130)]
    engine = Engine(model, **SMALL, enable_prefix_caching=False)
    alone = [outputs(serve(engine, [prompt], greedy()))[0] for prompt in prompts]
    assert outputs(serve(engine, prompts, greedy())) == alone
    crowd = prompts + [random_tokens(50 + number, 99 + number) for number in range(6)]
    assert outputs(serve(engine, crowd, greedy()))[: len(prompts)] == alone


@pytest.mark.parametrize("budget", [64, 100])
def test_tokens_do_not_depend_on_how_prompts_are_cut(model: Path, budget: int) -> None:
    prompts = [random_tokens(length, length) for length in (63, 64, 65, 200)]
    whole = outputs(serve(Engine(model, **SMALL, max_num_batched_tokens=4096), prompts, greedy()))
    engine = Engine(model, **SMALL, max_num_batched_tokens=budget, max_num_seqs=8)
    assert outputs(serve(engine, prompts, greedy())) == whole


def test_prompt_logprobs_are_those_of_transformers(
    model: Path, their_model: Callable[[Path], Any]
) -> None:
    prompt = random_tokens(150, 4)
    engine = Engine(model, **SMALL, max_num_batched_tokens=64)
    (request,) = serve(engine, [prompt], greedy(max_tokens=2, prompt_logprobs=3))
    logits = their_model(model)(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
    expected = logits.log_softmax(-1)
    first, *others = request.prompt_logprobs
    assert first is None
    assert [one.token_id for one in others if one is not None] == prompt[1:]
    for position, one in enumerate(others):
        assert one is not None
        assert abs(one.logprob - expected[position, prompt[position + 1]].item()) < TOLERANCE
        assert [token for token, _ in one.top] == expected[position].topk(3).indices.tolist()
