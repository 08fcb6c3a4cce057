"""Completions, tokens and metrics: what evaluation tools rely on."""

import math
from typing import Any

import httpx2
import openai
import pytest

from serving import Running

PROMPT = "The river runs through"


def test_a_stream_holds_what_the_text_holds(client: openai.OpenAI):
    ask: Any = {"model": "tiny-glm", "prompt": [PROMPT, "Once"], "n": 2, "max_tokens": 20}
    ask |= {"seed": 5, "logprobs": 2, "echo": True, "stop": "the"}
    once = client.completions.create(**ask)
    texts, tokens = [""] * 4, [[] for _ in range(4)]
    for chunk in client.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
    assert texts == [choice.text for choice in once.choices]
    # Which requests share a step differs, and with it the last bits.
    for streamed, choice in zip(tokens, once.choices, strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        assert streamed[0] is choice.logprobs.token_logprobs[0] is None
        assert streamed[1:] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-4)
    assert [text.startswith(PROMPT) for text in texts] == [True, True, False, False]


def test_a_prompt_is_described_as_lm_eval_needs_it(client: openai.OpenAI, http: httpx2.Client):
    """lm-eval sends token ids with echo, logprobs and max_tokens 1 and reads token_logprobs."""
    tokens = http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    ask: Any = {"model": "tiny-glm", "prompt": tokens, "echo": True, "logprobs": 1}
    answer = client.completions.create(**ask, max_tokens=1, temperature=0)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert found.token_logprobs[0] is None
    assert len(found.token_logprobs) == len(tokens) + 1
    assert all(-50 < one <= 0 for one in found.token_logprobs[1:])
    assert answer.choices[0].text.startswith(PROMPT)
    assert found.text_offset == [
        sum(map(len, found.tokens[:number])) for number in range(len(tokens) + 1)
    ]
    only = client.completions.create(**ask, max_tokens=0)
    assert only.choices[0].text == PROMPT
    assert only.choices[0].logprobs is not None
    assert only.choices[0].logprobs.token_logprobs == found.token_logprobs[:-1]
    assert only.usage is not None
    assert only.usage.completion_tokens == 0


def test_prompt_logprobs_come_by_token(http: httpx2.Client):
    body = {"model": "tiny-glm", "prompt": PROMPT, "max_tokens": 1, "prompt_logprobs": 2}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    for one in others:
        ranks = [entry["rank"] for entry in one.values()]
        assert ranks[:2] == [1, 2]
        assert all(math.exp(entry["logprob"]) <= 1 for entry in one.values())


def test_tokens_come_back_as_the_text_they_were(http: httpx2.Client):
    asked = {"model": "tiny-glm", "prompt": "Grüße, 世界 <|user|>", "return_token_strs": True}
    found = http.post("/tokenize", json=asked).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    back = http.post("/detokenize", json={"tokens": found["tokens"]}).json()
    assert back == {"prompt": asked["prompt"]}


def test_a_conversation_is_tokenized_by_the_template(http: httpx2.Client):
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    tokens = http.post("/tokenize", json=body).json()["tokens"]
    text = http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert text == "[gMASK]<sop><|user|>Hi<|assistant|><think>"
    body |= {"add_generation_prompt": False}
    shorter = http.post("/tokenize", json=body).json()["tokens"]
    assert shorter == tokens[:-2]


@pytest.mark.parametrize("name", ["tiny-glm", "claude-small"])
def test_every_alias_is_a_model(client: openai.OpenAI, name: str):
    assert client.models.retrieve(name).model_dump()["max_model_len"] == 4096
    assert name in [model.id for model in client.models.list()]
    answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=1)
    assert answer.model == name


def test_metrics_count_what_was_done(client: openai.OpenAI, http: httpx2.Client):
    def read() -> dict[str, float]:
        text = http.get("/metrics").text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    before = read()
    client.completions.create(
        model="tiny-glm", prompt=PROMPT, max_tokens=7, extra_body={"ignore_eos": True}
    )
    after = read()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("fourge:generation_tokens_total") == 7
    assert grown('fourge:request_success_total{finished_reason="length"}') == 1
    assert grown("fourge:time_to_first_token_seconds_count") == 1
    assert grown("fourge:inter_token_latency_seconds_count") == 6 or grown(
        "fourge:spec_decode_num_accepted_tokens_total"
    )
    assert grown("fourge:spec_decode_num_draft_tokens_total") > 0
    positions = [
        after[f'fourge:spec_decode_num_accepted_tokens_per_pos_total{{position="{number}"}}']
        for number in range(2)
    ]
    assert sum(positions) == after["fourge:spec_decode_num_accepted_tokens_total"]
    assert after["fourge:spec_decode_position_0_alarm"] in (0, 1)
    phases = ("queue", "prefill", "decode", "inference")
    assert [grown(f"fourge:request_{one}_time_seconds_count") for one in phases] == [1] * 4
    queue, prefill, decode, inference = (
        grown(f"fourge:request_{one}_time_seconds_sum") for one in phases
    )
    assert prefill + decode == pytest.approx(inference)
    assert min(queue, prefill, decode) > 0
    assert queue + inference < grown("fourge:e2e_request_latency_seconds_sum")
    assert grown("fourge:request_time_per_output_token_seconds_sum") == pytest.approx(decode / 6)
    (cache,) = [name for name in after if name.startswith("fourge:cache_config_info")]
    assert 'block_size="64"' in cache
    assert 'cache_tokens="16384"' in cache


def test_the_server_tells_what_it_is(http: httpx2.Client):
    info = http.get("/server_info").json()
    assert info["models"] == ["tiny-glm", "claude-small"]
    assert info["engine"]["num_speculative_tokens"] == 2
    assert info["stats"]["cache_tokens"] == 16384
    assert info["sampling_defaults"]["top_p"] == 0.95  # of generation_config.json
    assert http.get("/version").json()["version"] == info["version"]
    assert http.get("/health").status_code == http.get("/ready").status_code == 200


def test_words_that_may_not_come_and_tokens_that_may(http: httpx2.Client, server: Running):
    """Greedy, so that what is forbidden would come."""
    body = {"model": "tiny-glm", "prompt": "The river", "max_tokens": 12, "temperature": 0}

    def text_of(**changes: Any) -> str:
        answer = http.post("/v1/completions", json=body | changes)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    free = text_of()
    words = free.split()[:3]
    without = text_of(bad_words=words)
    assert not set(words) & set(without.split())
    tokenizer = server.service.served.tokenizer
    allowed = tokenizer.encode(" a b")
    tokens = tokenizer.encode(text_of(allowed_token_ids=allowed, ignore_eos=True))
    assert set(tokens) <= set(allowed)
    refused = http.post("/v1/completions", json=body | {"bad_words": ["a", " "]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "bad_words.1")
