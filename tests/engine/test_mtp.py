"""Speculation in the engine: the same tokens and cache, and drafts that are what they claim."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine_models import SMALL, greedy, outputs, random_tokens, serve
from fourge.engine import drafting
from fourge.engine.engine import Engine
from fourge.engine.params import SamplingParams
from fourge.engine.request import Request
from fourge.engine.runner import Runner
from fourge.models.layer import decoder_layer
from fourge.models.mtp import mtp_forward, mtp_input, mtp_output
from fourge.models.rope import rope_table

LENGTHS = (1, 5, 31, 63, 64, 65, 150)
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def texts(tiny_glm: Path) -> list[list[int]]:
    """The beginnings of conversations, as the example model knows them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tiny_glm))
    lines = (tiny_glm.parent / "conversations" / "broad.jsonl").read_text().splitlines()[:6]
    messages = [json.loads(line)["messages"] for line in lines]
    texts = [tokenizer.apply_chat_template(one, tokenize=False) for one in messages]
    return [tokenizer(text)["input_ids"][:100] for text in texts]


@pytest.mark.parametrize(("drafts", "method"), [(1, "standard"), (3, "block"), (5, "standard")])
def test_greedy_tokens_are_those_without_speculation(model: Path, drafts: int, method: str) -> None:
    prompts = [random_tokens(length, length) for length in LENGTHS]
    params = greedy(max_tokens=20, logprobs=0)
    plain = serve(
        Engine(model, **SMALL, max_num_batched_tokens=96, max_num_seqs=8), prompts, params
    )
    engine = Engine(
        model, **SMALL, max_num_batched_tokens=96, max_num_seqs=8, num_speculative_tokens=drafts,
        rejection_sample_method=method,
    )  # fmt: skip
    drafted = serve(engine, prompts, params)
    assert outputs(drafted) == outputs(plain)
    for one, other in zip(plain, drafted, strict=True):
        differences = [
            a.logprob - b.logprob for a, b in zip(one.logprobs, other.logprobs, strict=True)
        ]
        assert max(map(abs, differences)) < TOLERANCE


@pytest.mark.parametrize("way", ["probabilistic", "greedy"])
def test_sampled_texts_leave_the_cache_of_a_fresh_prompt(model: Path, way: str) -> None:
    """Latents of every layer, the MTP layer included, whose cache is written from drafts' hidden
    states first and must be from the target's in the end.
    """
    engine = Engine(model, **SMALL, num_speculative_tokens=3, draft_sample_method=way)
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=80, ignore_eos=True, logprobs=0)
    request = engine.add("sampled", random_tokens(40, 1), params)
    kept = latents_in_the_end(engine, request)
    fresh = engine.add("fresh", request.tokens, greedy(max_tokens=2, prompt_logprobs=0))
    expected = latents_in_the_end(engine, fresh)
    passed = [one.logprob for one in fresh.prompt_logprobs[40:] if one is not None]
    decoded = [one.logprob for one in request.logprobs]
    assert max(abs(a - b) for a, b in zip(passed, decoded, strict=True)) < TOLERANCE
    assert request.accepted < request.drafted
    for layer in range(4):
        # The newest token is in no layer of the target; token 0 is not in the MTP layer.
        rows = slice(1, 120) if layer == 3 else slice(0, 119)
        assert (kept[layer][rows] - expected[layer][rows]).abs().max() < TOLERANCE
        assert kept[layer][rows].abs().amax(-1).min() > 0


def latents_in_the_end(engine: Engine, request: Request) -> list[torch.Tensor]:
    """[tokens, ...] of every layer, from the pages that the request held."""
    pages: list[int] = []
    while engine.has_work:
        engine.step()
        pages = request.pages or pages
    slots = (torch.tensor(pages)[:, None] * 64 + torch.arange(64)).flatten()
    return [engine._runner._cache.read_latents(layer, slots) for layer in range(4)]


def test_drafts_are_what_the_mtp_layer_says_of_the_whole_text(tiny_glm: Path, texts: Any) -> None:
    """The second one from the layer's own output, after shared_head.norm."""
    engine = Engine(tiny_glm, **SMALL, num_speculative_tokens=2, max_num_batched_tokens=96)
    config, weights = engine.config, engine._runner._weights
    layer = unfused(weights.layers[-1], config.n_routed_experts)
    rope = rope_table(config, 200, "cpu")
    request = engine.add("one", texts[0], greedy(max_tokens=30))
    hidden: list[torch.Tensor] = []
    target = Runner.target
    compared = 0

    def say(states: torch.Tensor, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The last output, and the logits of the token after ``tokens``."""
        following = weights.embedding[torch.tensor(tokens[1:])]
        out = mtp_forward(states, following, [len(states)], layer, config, rope)[-1]
        return out, out @ weights.head.T

    def remember(self: Runner, chunks: Any, newest: Any) -> torch.Tensor:
        result = target(self, chunks, newest)
        hidden[chunks[0].start :] = list(result)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "target", remember)
        while engine.has_work:
            engine.step()
            if len(request.drafts) == 2:
                states = torch.stack(hidden[: len(request.tokens) - 1])
                out, logits = say(states, request.tokens)
                again = torch.cat([states, out[None]])
                _, recycled = say(again, request.tokens + request.drafts[:1])
                assert request.drafts == [logits.argmax().item(), recycled.argmax().item()]
                again[-1] /= layer["shared_head.norm.weight"]  # as before the norm, but for hnorm
                _, raw = say(again, request.tokens + request.drafts[:1])
                assert (raw - recycled).abs().max() > 0.01
                compared += 1
    assert compared > 8


SHARED = {"index_share_for_mtp_iteration": True}


@pytest.mark.parametrize("length", [20, 100])  # index_topk is 64
def test_later_drafts_look_where_the_first_one_looked(
    tiny_glm: Path, texts: Any, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And at nothing else, the drafts before them and themselves included."""
    engine = Engine(tiny_glm, **SMALL, num_speculative_tokens=3, hf_overrides=SHARED)
    config, weights = engine.config, engine._runner._weights
    layer = unfused(weights.layers[-1], config.n_routed_experts)
    rope = rope_table(config, 200, "cpu")
    prompt = texts[0][:length]
    assert len(prompt) == length
    seen: list[torch.Tensor] = []
    target = Runner.target

    def remember(self: Runner, chunks: Any, newest: Any) -> torch.Tensor:
        seen.append(target(self, chunks, newest))
        return seen[-1]

    monkeypatch.setattr(Runner, "target", remember)
    request = engine.add("one", prompt, greedy(max_tokens=30))
    engine.step()
    states, tokens = seen[0], request.tokens[1:]
    looked: Any = None
    found, others = [], []
    for _ in range(3):
        joined = mtp_input(states, weights.embedding[torch.tensor(tokens)], layer, config)

        def through(shares: bool, joined: Any = joined, looked: Any = looked) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(type(config), "has_indexer", lambda *_: not shares)
                number = config.num_hidden_layers
                return decoder_layer(joined, [len(joined)], layer, config, number, rope, looked)

        out, chosen = through(shares=looked is not None)
        others.append(mtp_output(through(shares=False)[0], layer, config)[-1] @ weights.head.T)
        if looked is None:
            everything = torch.arange(64).expand(len(joined), -1)
            everything = everything.where(everything <= torch.arange(len(joined))[:, None], -1)
            looked = [everything.int() if chosen[0] is None else chosen[0]]
        states = torch.cat([states, mtp_output(out, layer, config)[-1:]])
        found.append(states[-1] @ weights.head.T)
        tokens = [*tokens, found[-1].argmax().item()]
        looked = [torch.cat([looked[0], looked[0][-1:]])]
    assert request.drafts == [one.argmax().item() for one in found]
    assert (found[0] - others[0]).abs().max() == 0
    assert (found[1] - others[1]).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp8"])
def test_shared_selections_change_drafts_and_no_token(
    model: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On either way through the layers; index_topk is 32."""
    prompts = [random_tokens(length, length) for length in LENGTHS]
    options: dict[str, Any] = SMALL | {"kv_cache_dtype": kind}
    expected = outputs(serve(Engine(model, **options), prompts, greedy(max_tokens=20)))
    drafted: list[list[list[int]]] = []
    for way, overrides in (("fast", SHARED), ("slow", SHARED), ("fast", {})):
        with monkeypatch.context() as patch:
            if way == "slow":
                patch.setattr("fourge.engine.runner.can_decode", lambda *_: False)
            engine = Engine(model, **options, num_speculative_tokens=3, hf_overrides=overrides)
        assert (engine._runner._decoder is not None) == (way == "fast" and kind == "fp32")
        hand_over, all_drafts = drafting.Drafter.hand_over, []

        def note(
            self: drafting.Drafter, drafts: torch.Tensor, *,
            all_drafts: list[Any] = all_drafts, hand_over: Any = hand_over,
        ) -> None:  # fmt: skip
            all_drafts.append(drafts.tolist())
            hand_over(self, drafts)

        with monkeypatch.context() as patch:
            patch.setattr(drafting.Drafter, "hand_over", note)
            assert outputs(serve(engine, prompts, greedy(max_tokens=20))) == expected
        drafted.append(all_drafts)
    assert drafted[0] == drafted[1] != drafted[2]


def unfused(layer: Any, num_experts: int) -> dict[str, torch.Tensor]:
    """A layer's weights, expert by expert."""
    named = {name: weight for name, weight in layer.items() if "experts." not in name}
    named |= {name: weight for name, weight in layer.items() if "shared_experts." in name}
    for expert in range(num_experts):
        gate, up = layer["mlp.experts.gate_up_proj"][expert].chunk(2)
        stem = f"mlp.experts.{expert}"
        named |= {f"{stem}.gate_proj.weight": gate, f"{stem}.up_proj.weight": up}
        named[f"{stem}.down_proj.weight"] = layer["mlp.experts.down_proj"][expert]
    return named


def test_a_reused_prefix_drafts_as_well_as_a_computed_one(tiny_glm: Path, texts: Any) -> None:
    params = greedy(max_tokens=24)
    fresh = Engine(tiny_glm, **SMALL, num_speculative_tokens=3, enable_prefix_caching=False)
    expected = serve(fresh, [texts[1]], params)[0]
    engine = Engine(tiny_glm, **SMALL, num_speculative_tokens=3)
    serve(engine, [texts[1]], params)
    again = serve(engine, [texts[1]], params)[0]
    assert again.num_cached == 64
    assert (again.output, again.drafted, again.accepted) == (
        expected.output,
        expected.drafted,
        expected.accepted,
    )


def test_a_trained_layer_is_right_more_often_than_not(tiny_glm: Path, texts: Any) -> None:
    engine = Engine(tiny_glm, **SMALL, num_speculative_tokens=3)
    serve(engine, texts, greedy(max_tokens=40))
    stats = engine.stats()
    first, second, third = stats["acceptance_per_position"]
    assert first > 0.5
    assert first >= second >= third > 0.1
    assert stats["mean_acceptance_length"] == pytest.approx(1 + first + second + third)
    assert stats["steps"] < 40


def test_a_seed_gives_the_same_tokens_in_any_company(tiny_glm: Path, texts: Any) -> None:
    def params(seed: int) -> SamplingParams:
        return SamplingParams(temperature=0.9, top_p=0.9, seed=seed, max_tokens=24, ignore_eos=True)

    each = [params(number) for number in range(len(texts))]
    engine = Engine(tiny_glm, **SMALL, num_speculative_tokens=3, enable_prefix_caching=False)
    together = outputs(serve(engine, texts, each))
    alone = [outputs(serve(engine, [one], [own]))[0] for one, own in zip(texts, each, strict=True)]
    assert together == alone
    assert outputs(serve(engine, texts[:1], params(77)))[0] != alone[0]


def test_an_oracle_is_always_right_and_drafts_stop_with_the_request(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_tokens(20, 5)
    truth = outputs(serve(Engine(model, **SMALL), [prompt], greedy(max_tokens=22)))[0]

    def know(self: drafting.Drafter, logits: torch.Tensor, number: int) -> torch.Tensor:
        (request,) = self._requests
        return torch.tensor([([*truth, 0, 0, 0, 0])[request.num_output + number]])

    monkeypatch.setattr(drafting.Drafter, "choose", know)
    engine = Engine(model, **SMALL, num_speculative_tokens=3)
    (request,) = serve(engine, [prompt], greedy(max_tokens=22))
    assert request.output == truth
    # One token with the prompt, then 4 a step, and a last step of 1: its drafts would be too many.
    assert engine.counters.steps == 1 + 5 + 1
    assert (request.drafted, request.accepted) == (15, 15)
