"""What cannot be served is refused in a sentence, and the engine goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine_models import SMALL, greedy, outputs, random_tokens, serve, write_model
from fourge.engine.engine import Engine
from fourge.engine.params import SamplingParams, StructuredOutputs
from fourge.errors import CheckpointError, ConfigError, EngineError, RequestError

REQUESTS: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "empty": ([], {}, "prompt is empty"),
    "beyond the vocabulary": ([1, 256], {}, "has 256; tokens are 0 to 255"),
    "negative": ([-1], {}, "has -1"),
    "no token": (["a"], {}, "has 'a'"),
    "too long": ([1] * 400, {}, "has 400 tokens; with one more to generate at most 399 fit"),
    "temperature": ([1], {"temperature": -1.0}, "temperature is -1.0"),
    "not a number": ([1], {"temperature": float("nan")}, "temperature is nan"),
    "top_p": ([1], {"top_p": 0.0}, "top_p and repetition_penalty must be above 0"),
    "top_k": ([1], {"top_k": -2}, "top_k is -2"),
    "min above max": ([1], {"min_tokens": 5, "max_tokens": 2}, "more than max_tokens 2"),
    "max_tokens": ([1], {"max_tokens": 0}, "max_tokens is 0"),
    "stop": ([1], {"stop_token_ids": [999]}, "stop_token_ids has 999"),
    "bias": ([1], {"logit_bias": {1: "x"}}, "logit_bias of token 1 is 'x'"),
    "infinite bias": ([1], {"logit_bias": {1: float("inf")}}, "logit_bias of token 1 is inf"),
    "allowed": ([1], {"allowed_token_ids": [256]}, "allowed_token_ids has 256"),
    "nothing allowed": ([1], {"allowed_token_ids": []}, "has 0 tokens, and none"),
    "allowed and bad": (
        [1],
        {"allowed_token_ids": [5], "bad_words_token_ids": [[5]]},
        "has 1 tokens, and none",
    ),
    "bad word": ([1], {"bad_words_token_ids": [[1, -1]]}, "bad_words_token_ids has -1"),
    "no bad word": ([1], {"bad_words_token_ids": [[1], []]}, "a word of no tokens"),
    "logprobs": ([1], {"logprobs": 1000}, "at most 100"),
    "penalty": ([1], {"presence_penalty": 3.0}, "from -2 to 2"),
    "no tokenizer": ([1], {"structured_outputs": StructuredOutputs(regex="a")}, "need a tokenizer"),
}
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"max_num_seq": 2}, "did you mean max_num_seqs"),
    "device": ({"device": "tpu"}, "device is 'tpu'; it must be one of auto, cpu, cuda"),
    "cache": ({"kv_cache_dtype": "int4"}, "one of auto, bf16, fp32, fp8"),
    "drafts": ({"num_speculative_tokens": 9}, "from 0 to 8"),
    "flying drafts": (
        {"async_scheduling": True, "num_speculative_tokens": 1},
        "leave one of the two out",
    ),
    "budget": ({"max_num_batched_tokens": 64, "num_speculative_tokens": 3}, "takes 128"),
    "too long": ({"max_model_len": 5000}, "the model has 4096 positions"),
    "too little cache": ({"cache_tokens": 128, "max_model_len": 400}, "holds 128 tokens"),
    "too much cache": ({"cache_tokens": 1 << 40}, "ask for fewer cache_tokens"),
    "share": ({"gpu_memory_utilization": 1.5}, "above 0, at most 1"),
    "zero": ({"max_num_seqs": 0}, "max_num_seqs is 0"),
}
OVERRIDES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"index_topk_patern": "FSF"}, "did you mean index_topk_pattern"),
    "length": ({"index_topk_pattern": "FS"}, "3 letters F or S"),
    "first shared": ({"index_topk_pattern": "SFF"}, "first layer with its own indexer"),
    "shape": ({"hidden_size": 128}, "demands"),
}


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return Engine(model, **SMALL, max_model_len=400)


@pytest.mark.parametrize("case", REQUESTS)
def test_a_request_is_refused_and_the_engine_serves_the_next(engine: Engine, case: str) -> None:
    prompt, params, message = REQUESTS[case]
    with pytest.raises(RequestError, match=message):
        engine.add("bad", prompt, SamplingParams(**params))
    assert not engine.has_work
    (request,) = serve(engine, [[1, 2, 3]], greedy(max_tokens=2))
    assert request.num_output == 2


def test_an_id_is_used_once_at_a_time(engine: Engine) -> None:
    engine.add("same", [1], greedy())
    with pytest.raises(RequestError, match="there is a request 'same' already"):
        engine.add("same", [1], greedy())
    engine.abort("same")
    engine.add("same", [1], greedy())
    engine.abort("same")


@pytest.mark.parametrize("case", OPTIONS)
def test_options_are_refused_by_name(model: Path, case: str) -> None:
    options, message = OPTIONS[case]
    with pytest.raises(EngineError, match=message):
        Engine(model, **options)


@pytest.mark.parametrize("case", OVERRIDES)
def test_overrides_are_checked(model: Path, case: str) -> None:
    overrides, message = OVERRIDES[case]
    with pytest.raises((ConfigError, CheckpointError), match=message):
        Engine(model, **SMALL, hf_overrides=overrides)


def test_an_override_takes_the_place_of_other_keys_about_the_same(tmp_path: Path) -> None:
    """The types in the file say "full"; vllm's users override the pattern."""
    folder = write_model(tmp_path / "full", indexer_types=["full"] * 3)
    shared = write_model(tmp_path / "shared", index_topk_pattern="FSF")
    overridden = Engine(folder, **SMALL, hf_overrides={"index_topk_pattern": "FSF"})
    prompts = [random_tokens(150, 1)]
    params = greedy(logprobs=2)
    expected = serve(Engine(shared, **SMALL), prompts, params)
    assert serve(overridden, prompts, params)[0].logprobs == expected[0].logprobs
    plain = serve(Engine(folder, **SMALL), prompts, params)
    assert plain[0].logprobs != expected[0].logprobs


def test_speculation_needs_an_mtp_layer(tmp_path: Path) -> None:
    folder = write_model(tmp_path, num_nextn_predict_layers=0)
    with pytest.raises(EngineError, match="has no MTP layer"):
        Engine(folder, **SMALL, num_speculative_tokens=1)


def test_a_request_whose_numbers_are_not_finite_ends_alone(model: Path) -> None:
    engine = Engine(model, **SMALL, enable_prefix_caching=False)
    prompts = [random_tokens(20, number) for number in range(3)]
    expected = outputs(serve(engine, prompts, greedy()))
    weights = engine._runner._weights.embedding
    poisoned = next(token for token in range(256) if all(token not in one for one in prompts))
    assert all(poisoned not in output for output in expected)
    weights[poisoned] = torch.nan
    requests = serve(engine, [prompts[0], [poisoned, 1, 2], *prompts[1:]], greedy())
    assert (requests[1].finish_reason, requests[1].output) == ("error", [])
    assert requests[1].error == "the model's output is not finite"
    assert outputs([requests[0], *requests[2:]]) == expected


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp8"])
def test_whoever_gets_the_pages_of_such_a_request_is_not_harmed(
    model: Path, kind: str, drafts: int
) -> None:
    engine = Engine(
        model, device="cpu", cache_tokens=512, kv_cache_dtype=kind, num_speculative_tokens=drafts,
        enable_prefix_caching=False,
    )  # fmt: skip
    prompts = [random_tokens(20, number) for number in range(3)]
    expected = outputs(serve(engine, prompts, greedy()))
    used = {token for one in (*prompts, *expected) for token in one}
    poisoned = next(token for token in range(256) if token not in used)
    engine._runner._weights.embedding[poisoned] = torch.nan
    failed = serve(engine, [[poisoned] * 150] * 3, greedy())
    assert all(one.finish_reason == "error" for one in failed)
    assert outputs(serve(engine, prompts, greedy())) == expected
