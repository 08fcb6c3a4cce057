"""Anthropic's Messages API through Anthropic's own client."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pytest

from scripted_engine import ScriptedEngine, scripted
from serving import Running, running

SPEECH = (
    "I think.</think>Let me see."
    "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value>"
    "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call>"
    "<tool_call>get_time</tool_call>"
)
TOOLS: Any = [
    {
        "name": "get_weather",
        "description": "Now",
        "input_schema": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
        "cache_control": {"type": "ephemeral"},
    },
    {"name": "get_time", "input_schema": {"type": "object", "properties": {}}},
]
ASK: Any = {
    "model": "glm",
    "max_tokens": 500,
    "messages": [{"role": "user", "content": "Hi"}],
    "thinking": {"type": "enabled", "budget_tokens": 1024},
}


@pytest.fixture
def speaking(tiny_glm: Path) -> Iterator[tuple[Running, ScriptedEngine]]:
    served, engine = scripted(tiny_glm, SPEECH, stride=2)
    with running(served) as found:
        yield found, engine


@pytest.fixture
def claude(speaking: tuple[Running, ScriptedEngine]) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=speaking[0].url, api_key="-", max_retries=0) as found:
        yield found


def blocks(message: Any) -> list[dict[str, Any]]:
    return [block.model_dump(exclude_none=True) for block in message.content]


def test_a_stream_holds_what_the_message_holds(claude: anthropic.Anthropic):
    once = claude.messages.create(**ASK, tools=TOOLS)
    with claude.messages.stream(**ASK, tools=TOOLS) as stream:
        streamed = stream.get_final_message()
    for message in (once, streamed):
        thinking, text, weather, time = blocks(message)
        assert (thinking["type"], thinking["thinking"]) == ("thinking", "I think.")
        assert (text["type"], text["text"]) == ("text", "Let me see.")
        assert (weather["type"], weather["name"]) == ("tool_use", "get_weather")
        assert weather["input"] == {"city": "Paris", "days": 3}
        assert (time["name"], time["input"]) == ("get_time", {})
        assert weather["id"] != time["id"]
        assert (message.stop_reason, message.stop_sequence) == ("tool_use", None)
    assert streamed.usage.output_tokens == once.usage.output_tokens
    assert streamed.usage.input_tokens == once.usage.input_tokens
    assert once.usage.cache_read_input_tokens == 64  # as the script has it


def test_the_events_come_in_their_order(speaking: tuple[Running, ScriptedEngine]):
    url = f"{speaking[0].url}/v1/messages?beta=true"
    answer = httpx2.post(url, json=ASK | {"tools": TOOLS, "stream": True})
    names, documents = [], []
    for one in answer.text.strip().split("\n\n"):
        name, data = one.split("\n")
        names.append(name.removeprefix("event: "))
        documents.append(json.loads(data.removeprefix("data: ")))
    assert names == [one["type"] for one in documents]
    assert (names[0], names[-2:]) == ("message_start", ["message_delta", "message_stop"])
    opened = None
    for one in documents[1:-2]:
        if one["type"] == "content_block_start":
            assert opened is None
            opened = one["index"]
        assert one["index"] == opened
        if one["type"] == "content_block_stop":
            opened = None
        elif one["type"] == "content_block_delta":
            assert all(one["delta"].values())
    assert opened is None
    assert [one["index"] for one in documents if one["type"] == "content_block_stop"] == [
        0,
        1,
        2,
        3,
    ]


def test_a_tool_loop_is_rendered_with_its_thoughts(
    claude: anthropic.Anthropic, speaking: tuple[Running, ScriptedEngine]
):
    first = claude.messages.create(**ASK, tools=TOOLS)
    calls = [block for block in first.content if block.type == "tool_use"]
    results: Any = [
        {
            "type": "tool_result",
            "tool_use_id": calls[0].id,
            "content": [{"type": "text", "text": "sunny"}],
            "cache_control": {"type": "ephemeral"},
        },
        {"type": "tool_result", "tool_use_id": calls[1].id, "content": "late", "is_error": True},
        {"type": "text", "text": "Go on."},
    ]
    messages: Any = [
        *ASK["messages"],
        {"role": "assistant", "content": blocks(first)},
        {"role": "user", "content": results},
    ]
    system: Any = [{"type": "text", "text": "Be brief."}]
    edits: Any = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    claude.messages.create(
        **ASK | {"messages": messages}, tools=TOOLS, system=system,
        extra_body={"context_management": edits},
    )  # fmt: skip
    prompt = str(speaking[0].service.served.tokenizer.decode(speaking[1].prompts[-1]))
    assert "<|system|>Be brief.<|user|>Hi<|assistant|><think>" + SPEECH in prompt
    assert prompt.endswith(
        "<|observation|><tool_response>sunny</tool_response><tool_response>Error: late"
        "</tool_response><|user|>Go on.<|assistant|><think>"
    )


def test_thinking_is_off_unless_it_is_asked_for(
    claude: anthropic.Anthropic, speaking: tuple[Running, ScriptedEngine]
):
    quiet = {name: value for name, value in ASK.items() if name != "thinking"}
    claude.messages.create(**quiet)
    claude.messages.create(**quiet, thinking={"type": "disabled"})
    claude.messages.create(**quiet, thinking={"type": "adaptive"})
    tokenizer = speaking[0].service.served.tokenizer
    ends = [str(tokenizer.decode(prompt[-1:])) for prompt in speaking[1].prompts]
    assert ends == ["</think>", "</think>", "<think>"]
    hidden = claude.messages.create(**quiet, thinking={"type": "adaptive", "display": "omitted"})
    assert [block.type for block in hidden.content] == ["text"]


def test_clients_know_the_id_of_a_request(claude: anthropic.Anthropic):
    message = claude.messages.create(**ASK, extra_headers={"X-Request-Id": "mine-2"})
    assert message._request_id == "mine-2"
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude.messages.create(**ASK | {"model": "other"})
    assert caught.value.request_id == caught.value.body["request_id"]  # type: ignore[index]


def test_tokens_are_counted_as_they_are_read(
    claude: anthropic.Anthropic, speaking: tuple[Running, ScriptedEngine]
):
    asked: Any = {name: value for name, value in ASK.items() if name != "max_tokens"}
    count = claude.messages.count_tokens(**asked, tools=TOOLS, system="Be brief.")
    claude.messages.create(**ASK, tools=TOOLS, system="Be brief.")
    assert count.input_tokens == len(speaking[1].prompts[-1])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_token": 3}, "'max_token' is not a field"),
        ({"mcp_servers": []}, "'mcp_servers' is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'tool_use'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)  # fmt: skip
def test_errors_have_anthropics_form(claude: anthropic.Anthropic, changes: Any, says: str):
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(**ASK, extra_body=changes)
    body: Any = caught.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert says in body["error"]["message"]
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(**ASK | {"model": "claude-9"})


def test_a_real_engine_calls_tools_and_keeps_the_budget(server: Running):
    with anthropic.Anthropic(base_url=server.url, api_key="-", max_retries=0) as claude:
        common: Any = ASK | {"model": "claude-small", "thinking": {"type": "disabled"}}
        called = claude.messages.create(
            **common, tools=TOOLS[1:], tool_choice={"type": "tool", "name": "get_time"}
        )
        assert [block.type for block in called.content] == ["tool_use"]
        assert called.stop_reason == "tool_use"
        stopped = claude.messages.create(**common, stop_sequences=["a", "e", "i", "o", "u"])
        assert stopped.stop_reason == "stop_sequence"
        assert stopped.stop_sequence in ("a", "e", "i", "o", "u")
        short = claude.messages.create(
            **common | {"thinking": {"type": "enabled", "budget_tokens": 4}, "max_tokens": 12},
            extra_body={"temperature": 0},
        )
    chat = httpx2.post(
        f"{server.url}/v1/chat/completions",
        json={
            "model": "tiny-glm", "temperature": 0, "max_tokens": 12, "thinking_token_budget": 4,
            "messages": ASK["messages"],
        },
        timeout=60,
    ).json()  # fmt: skip
    assert chat["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 5  # and </think>
    assert chat["choices"][0]["message"]["content"] == short.content[-1].text
