"""Distributions, penalties and stops; the law and the repeatability of what is drawn."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine_models import SMALL, greedy, random_tokens, serve
from fourge.engine.distributions import Row, cut, target_distributions
from fourge.engine.engine import Engine
from fourge.engine.params import Defaults, SamplingParams, read_defaults, resolved
from fourge.engine.randomness import ACCEPT, CHOOSE, draw, uniform
from fourge.engine.request import Request

VOCAB = 8
CPU = torch.device("cpu")
LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, -4.0])


def distribution(
    output: Sequence[int] = (), prompt: Sequence[int] = (7,), **params: Any
) -> torch.Tensor:
    chosen = resolved(SamplingParams(**({"temperature": 1.0} | params)), Defaults(), VOCAB)
    request = Request(
        request_id="", tokens=[*prompt, *output], num_prompt=len(prompt), max_length=100,
        params=chosen, stop_tokens=frozenset({0}), seed=0, arrival=0,
    )  # fmt: skip
    return target_distributions(LOGITS[None].clone(), [Row(request, 0)], None)[0]


def softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1)


def only(kept: int) -> torch.Tensor:
    """softmax over the first ``kept``, which are the best."""
    return torch.cat([softmax(LOGITS[:kept]), torch.zeros(VOCAB - kept)])


def test_each_parameter_does_what_its_formula_says() -> None:
    changed = LOGITS.clone()
    cases = {
        "temperature": (distribution(temperature=0.5), softmax(LOGITS / 0.5)),
        "cold": (distribution(temperature=1e-6), torch.eye(VOCAB)[0]),
        "greedy": (distribution(temperature=0.0), torch.eye(VOCAB)[0]),
        "top_k": (distribution(top_k=3), only(3)),
        "top_k beyond": (distribution(top_k=100), softmax(LOGITS)),
        "top_p": (distribution(top_p=0.7), only(2)),  # 0.53 + 0.20
        "top_p of one token": (distribution(top_p=0.01), only(1)),
        "min_p": (distribution(min_p=0.2), only(3)),  # exp(-1.5) = 0.22, exp(-2) = 0.14
        # Of the four best, two have 0.79; of all, only 0.73.
        "all of them": (distribution(top_k=4, top_p=0.75, min_p=0.05), only(2)),
    }
    changed[3] += 5
    cases["logit_bias"] = (distribution(logit_bias={3: 5.0}), softmax(changed))
    changed = LOGITS.clone()
    changed[1] -= 0.5 + 2 * 0.3
    changed[2] -= 0.5 + 0.3
    output = (1, 2, 1)
    penal = {"presence_penalty": 0.5, "frequency_penalty": 0.3}
    cases["presence and frequency"] = (distribution(output, **penal), softmax(changed))
    changed = LOGITS.clone()
    changed[0] /= 1.5
    changed[6] *= 1.5
    changed[7] *= 1.5
    cases["repetition, of the prompt too"] = (
        distribution((0, 6), repetition_penalty=1.5),
        softmax(changed),
    )
    changed = LOGITS.clone()
    changed[0] = -torch.inf
    cases["min_tokens"] = (distribution((1,), min_tokens=2), softmax(changed))
    cases["min_tokens, reached"] = (distribution((1, 1), min_tokens=2), softmax(LOGITS))
    changed = torch.full((VOCAB,), -torch.inf)
    changed[[2, 5]] = LOGITS[[2, 5]]
    cases["allowed"] = (distribution(allowed_token_ids=[5, 2]), softmax(changed))
    words = [[3], [4, 6], [1, 4, 5], [2, 4, 7], [4, 4, 4, 1]]
    changed = LOGITS.clone()
    changed[[3, 6, 5]] = -torch.inf
    bad = {"bad_words_token_ids": words}
    cases["bad words"] = (distribution((1, 4), prompt=(2, 4), **bad), softmax(changed))
    changed = LOGITS.clone()
    changed[3] = -torch.inf
    cases["bad words, begun by the prompt"] = (distribution(prompt=(4,), **bad), softmax(changed))
    for name, (found, expected) in cases.items():
        assert torch.allclose(found, expected, atol=1e-6), name


def test_rows_of_one_batch_do_not_touch_each_other() -> None:
    rows = {"temperature": [0.0, 0.7, 1.0], "min_p": [0.0, 0.1, 0.0], "top_k": [0, 2, 0],
            "top_p": [1.0, 1.0, 0.6]}  # fmt: skip
    together = cut(LOGITS.repeat(3, 1), **rows)
    for number in range(3):
        alone = cut(LOGITS[None].clone(), **{name: [own[number]] for name, own in rows.items()})
        assert torch.equal(together[number], alone[0])


def test_draws_follow_the_distribution() -> None:
    probs = softmax(LOGITS)
    count = 100_000
    u = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = torch.bincount(draw(probs.expand(count, -1), u), minlength=VOCAB)
    expected = probs.double() * count
    assert ((drawn - expected) ** 2 / expected).sum() < 29.9  # 0.9999 quantile, 7 degrees


def test_what_has_no_probability_is_never_drawn() -> None:
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    edges = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(probs.expand(3, -1), edges).tolist() == [1, 3, 3]


def test_numbers_depend_on_seed_position_and_purpose_and_are_uniform() -> None:
    positions = np.arange(20_000)
    numbers = uniform(np.array([7]), positions, CHOOSE, CPU)
    assert torch.equal(numbers[100:200], uniform(np.array([7]), positions[100:200], CHOOSE, CPU))
    for other in (
        uniform(np.array([8]), positions, CHOOSE, CPU),
        uniform(np.array([7]), positions, ACCEPT, CPU),
    ):
        assert (numbers == other).sum() == 0
        assert abs(torch.corrcoef(torch.stack([numbers, other]))[0, 1].item()) < 0.03
    counts = torch.histc(numbers, bins=20, min=0, max=1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 53  # 0.9999 quantile, 19 degrees


def test_the_checkpoints_generation_config_is_the_default() -> None:
    generation = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [3, 4], "do_sample": True}
    defaults = read_defaults(generation, {"eos_token_id": 1})
    params = resolved(SamplingParams(top_p=0.5), defaults, VOCAB)
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.5, 0)
    assert defaults.eos_token_ids == {3, 4}
    assert read_defaults({}, {"eos_token_id": 1}).eos_token_ids == {1}
    assert resolved(SamplingParams(), read_defaults({"do_sample": False}, {}), 8).temperature == 0


@pytest.mark.parametrize("drafts", [0, 3])
def test_requests_stop_where_they_should(model: Path, drafts: int) -> None:
    engine = Engine(model, **SMALL, num_speculative_tokens=drafts)
    prompt = random_tokens(20, 1)
    (free,) = serve(engine, [prompt], greedy(max_tokens=12))
    assert free.finish_reason == "length"
    third = free.output[3]
    first = free.output.index(third) + 1
    (stopped,) = serve(engine, [prompt], greedy(stop_token_ids=[third]))
    assert (stopped.output, stopped.finish_reason) == (free.output[:first], "stop")
    (later,) = serve(engine, [prompt], greedy(stop_token_ids=[third], min_tokens=8))
    assert third not in later.output[:7]
    assert later.num_output >= 8
    narrow = Engine(model, **SMALL, num_speculative_tokens=drafts, max_model_len=25)
    (full,) = serve(narrow, [prompt], greedy(max_tokens=None))
    assert (full.output, full.finish_reason) == (free.output[:5], "length")


def test_seeds_hold_in_any_company_and_differ(model: Path) -> None:
    engine = Engine(model, **SMALL)
    prompt = random_tokens(20, 1)
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=8) for seed in (1, 2, 1)]
    first, second, third = (one.output for one in serve(engine, [prompt] * 3, params))
    assert first == third != second
    assert serve(engine, [prompt], params[:1])[0].output == first
    unseeded = [SamplingParams(temperature=1.0, max_tokens=8)] * 2
    one, other = serve(engine, [prompt] * 2, unseeded)
    assert one.output != other.output


@pytest.mark.parametrize("drafts", [0, 3])
def test_penalties_and_biases_reach_every_place(model: Path, drafts: int) -> None:
    engine = Engine(model, **SMALL, num_speculative_tokens=drafts)
    prompt = random_tokens(20, 1)
    (once,) = serve(engine, [prompt], greedy(presence_penalty=2.0, logit_bias={5: 30.0}))
    assert once.output[0] == 5
    assert once.output.count(5) == 12  # a bias of 30 outweighs a penalty of 2
    (never,) = serve(engine, [prompt], greedy(logit_bias={5: -100.0}, repetition_penalty=50.0))
    assert 5 not in never.output
    assert len(set(never.output)) == 12


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_tokens_are_never_chosen(model: Path, drafts: int, temperature: float) -> None:
    engine = Engine(model, **SMALL, num_speculative_tokens=drafts)
    prompt = random_tokens(20, 1)
    sampling = {"temperature": temperature, "seed": 4, "max_tokens": 40}
    allowed = [3, 9, 200]
    (free,) = serve(engine, [prompt], greedy(allowed_token_ids=allowed, **sampling))
    assert set(free.output) <= set(allowed)
    pairs = list(itertools.pairwise(free.output))
    bad = [list(pairs[0]), list(pairs[2])]
    params = greedy(allowed_token_ids=allowed, bad_words_token_ids=bad, **sampling)
    (request,) = serve(engine, [prompt], params)
    assert set(request.output) <= set(allowed)
    assert not {tuple(word) for word in bad} & set(itertools.pairwise(request.output))
    assert request.num_output == 40


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_forbids_all_tokens_ends_alone(
    model: Path, drafts: int, temperature: float
) -> None:
    engine = Engine(model, **SMALL, num_speculative_tokens=drafts)
    prompt = random_tokens(20, 1)
    dead_end = greedy(
        temperature=temperature, allowed_token_ids=[3], bad_words_token_ids=[[3, 3, 3]]
    )
    ended, other = serve(engine, [prompt, prompt], [dead_end, greedy()])
    assert (ended.output, ended.finish_reason) == ([3, 3], "error")
    assert "leaves no token" in (ended.error or "")
    assert other.num_output == 12


def test_logprobs_are_the_models_own_whatever_is_sampled(model: Path) -> None:
    engine = Engine(model, **SMALL)
    prompt = random_tokens(20, 1)
    params = SamplingParams(temperature=0.1, seed=1, max_tokens=4, logprobs=3, top_k=1)
    (request,) = serve(engine, [prompt], params)
    (plain,) = serve(engine, [prompt], greedy(max_tokens=4, logprobs=3))
    assert request.logprobs == plain.logprobs
    for token, own in zip(request.output, request.logprobs, strict=True):
        assert own.token_id == token == own.top[0][0]
        assert own.logprob == own.top[0][1]
        assert len(own.top) == 3
