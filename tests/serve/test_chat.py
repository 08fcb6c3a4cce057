"""Chat completions through OpenAI's own client: what is streamed is what is sent whole."""

import json
from typing import Any

import openai
import pytest

from openai_answers import gather, whole

HELLO: list[Any] = [{"role": "user", "content": "Write a line about rivers."}]
DIRECT = {"chat_template_kwargs": {"enable_thinking": False}}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 40, "n": 3},
        {"max_completion_tokens": 60, "extra_body": DIRECT, "stop": ["e", "\n\n"]},
        {"max_tokens": 30, "logprobs": True, "top_logprobs": 3, "temperature": 0},
        {"max_tokens": 60, "tools": [WEATHER], "tool_choice": "required", "extra_body": DIRECT},
        {"max_tokens": 100, "tools": [WEATHER], "extra_body": DIRECT, "n": 2},
        {"max_tokens": 5, "tools": [WEATHER], "tool_choice": "required", "extra_body": DIRECT},
    ],
    ids=["n", "stop", "logprobs", "required", "auto", "cut"],
)
def test_a_stream_holds_what_the_message_holds(client: openai.OpenAI, options: Any):
    common: Any = {"model": "tiny-glm", "messages": HELLO, "seed": 7} | options
    once = client.chat.completions.create(**common)
    streamed = client.chat.completions.create(
        **common, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(streamed)
    assert gather(chunks) == whole(once)
    for name in ("prompt_tokens", "completion_tokens", "completion_tokens_details"):
        assert getattr(chunks[-1].usage, name) == getattr(once.usage, name)
    assert len({chunk.id for chunk in chunks}) == len({chunk.created for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"


def test_answers_of_one_request_differ_and_a_seed_repeats_them(client: openai.OpenAI):
    ask: Any = {"model": "tiny-glm", "messages": HELLO, "n": 2, "max_tokens": 24, "seed": 3}
    first, again = (whole(client.chat.completions.create(**ask)) for _ in range(2))
    assert first == again
    assert first[0] != first[1]


def test_a_stop_string_is_not_shown_unless_it_is_asked_for(client: openai.OpenAI):
    ask: Any = {"model": "tiny-glm", "messages": HELLO, "temperature": 0, "max_tokens": 40}
    text = client.chat.completions.create(**ask, extra_body=DIRECT).choices[0].message.content
    assert text is not None
    stop = text[5:9]
    cut = client.chat.completions.create(**ask, extra_body=DIRECT, stop=stop)
    assert (cut.choices[0].message.content or "") == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].model_dump()["stop_reason"] == stop
    extra = DIRECT | {"include_stop_str_in_output": True}
    shown = client.chat.completions.create(**ask, extra_body=extra, stop=stop)
    assert shown.choices[0].message.content == text[: text.index(stop) + len(stop)]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_required_and_named_tools_are_called_with_valid_arguments(
    client: openai.OpenAI, choice: Any
):
    other = {"type": "function", "function": {"name": "other"}}
    common: Any = {"model": "tiny-glm", "messages": HELLO, "max_tokens": 200, "tool_choice": choice}
    tools = [WEATHER] if choice == "required" else [other, WEATHER]
    for seed in range(3):
        answer = client.chat.completions.create(
            **common, seed=seed, extra_body=DIRECT, tools=tools, parallel_tool_calls=False
        )
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "get_weather"
        arguments = json.loads(call.function.arguments)
        # xgrammar (0.2.8) allows white space around the value, which is a part of a string.
        assert arguments["city"].strip() in ("Paris", "Rome")
        assert 1 <= arguments["days"] <= 9
        assert answer.choices[0].finish_reason == "tool_calls"
        assert answer.choices[0].message.content is None


def test_a_schema_holds_for_the_answer(client: openai.OpenAI):
    schema = WEATHER["function"]["parameters"]
    form: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema}}
    # JSON may hold any number of blanks, and a model so small may write nothing else ("length").
    ended = 0
    for seed in range(8):
        answer = client.chat.completions.create(
            model="tiny-glm", messages=HELLO, max_tokens=100, extra_body=DIRECT,
            response_format=form, seed=seed,
        )  # fmt: skip
        if answer.choices[0].finish_reason == "stop":
            found = json.loads(answer.choices[0].message.content or "")
            assert found["city"] in ("Paris", "Rome")
            ended += 1
    assert ended > 0


def test_an_answer_is_continued_where_it_ended(client: openai.OpenAI):
    ask: Any = {"model": "tiny-glm", "temperature": 0, "max_tokens": 8}
    begun: Any = [*HELLO, {"role": "assistant", "content": "Rivers are"}]
    answer = client.chat.completions.create(
        **ask, messages=begun, extra_body={"continue_final_message": True}
    )
    prompt = "[gMASK]<sop><|user|>Write a line about rivers.<|assistant|></think>Rivers are"
    plain = client.completions.create(**ask, prompt=prompt)
    assert plain.choices[0].text == answer.choices[0].message.content
    assert answer.choices[0].message.model_dump().get("reasoning") is None


def test_usage_counts_reasoning_cache_and_drafts(client: openai.OpenAI):
    long: Any = [{"role": "user", "content": "All work and no play. " * 40}]
    ask: Any = {"model": "tiny-glm", "messages": long, "max_tokens": 20, "seed": 1}
    client.chat.completions.create(**ask)
    answer = client.chat.completions.create(**ask)
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.completion_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens // 64 * 64
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < (usage.completion_tokens_details.reasoning_tokens or 0) <= 20
    drafts = answer.model_dump()["metrics"]["speculative_decoding"]
    assert drafts["num_draft_tokens"] == 2 * drafts["num_drafts"]
    assert 1 <= drafts["mean_acceptance_length"] <= 3


def test_log_probabilities_are_of_every_token(client: openai.OpenAI):
    answer = client.chat.completions.create(
        model="tiny-glm", messages=HELLO, max_tokens=9, temperature=0, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 9
    for one in logprobs.content:
        assert len(one.top_logprobs) == 2
        assert one.top_logprobs[0].logprob == one.logprob  # greedy
        assert bytes(one.bytes or []).decode() == one.token


def test_effort_none_is_no_thinking(client: openai.OpenAI):
    answer = client.chat.completions.create(
        model="tiny-glm", messages=HELLO, max_tokens=8, reasoning_effort="none"
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0
