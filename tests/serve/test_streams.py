"""Tool calls and reasoning through HTTP, on an engine that says what the test wants to hear."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from openai_answers import gather, whole
from scripted_engine import scripted
from serving import running

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "write_file",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string"}, "content": {"type": "string"}},
            },
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]
TEXT = 'I think.</think>Let me <b>see</b>: "é".\n'
CALLS = (
    "<tool_call>write_file<arg_key>path</arg_key><arg_value>/a</arg_value>"
    '<arg_key>content</arg_key><arg_value>x = "1"\n\\n é STOP</arg_value></tool_call>'
    "<tool_call>get_time</tool_call>"
)
ASK: Any = {"model": "tiny-glm", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize("stride", [1, 3, 1000])
def test_calls_and_reasoning_are_whole_however_they_come(tiny_glm: Path, stride: int):
    served, _ = scripted(tiny_glm, TEXT + CALLS, stride=stride)
    with running(served) as found:
        client = openai.OpenAI(base_url=f"{found.url}/v1", api_key="-")
        once = whole(client.chat.completions.create(**ASK, tools=TOOLS, stop="STOP"))
        streamed = gather(
            client.chat.completions.create(**ASK, tools=TOOLS, stop="STOP", stream=True)
        )
        client.close()
    assert once == streamed
    answer = once[0]
    assert answer["reasoning"] == "I think."
    assert answer["content"] == 'Let me <b>see</b>: "é".\n'
    assert [name for name, _ in answer["calls"].values()] == ["write_file", "get_time"]
    arguments = [json.loads(text) for _, text in answer["calls"].values()]
    # A stop string within an argument is none.
    assert arguments == [{"path": "/a", "content": 'x = "1"\n\\n é STOP'}, {}]
    assert answer["finish"] == "tool_calls"


@pytest.mark.parametrize("stride", [1, 2, 1000])
def test_a_stop_string_is_held_back_across_tokens(tiny_glm: Path, stride: int):
    served, engine = scripted(tiny_glm, "STOP.</think>one STO two STOP three", stride=stride)
    with running(served) as found:
        client = openai.OpenAI(base_url=f"{found.url}/v1", api_key="-")
        chunks = list(client.chat.completions.create(**ASK, stop=["STOP"], stream=True))
        client.close()
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == "one STO two "
    assert gather(chunks)[0]["reasoning"] == "STOP."  # there it stops nothing
    assert chunks[-1].choices[0].model_dump()["stop_reason"] == "STOP"
    assert engine.under_way == 0


def test_a_stop_string_counts_from_min_tokens_on(tiny_glm: Path):
    served, _ = scripted(tiny_glm, "</think>a b a b a b")
    tokens = served.tokenizer.encode("</think>a b a")
    body = ASK | {"stop": "b", "min_tokens": len(tokens)}
    with running(served) as found:
        answer = httpx2.post(f"{found.url}/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == "a b a "


def test_one_call_where_one_is_asked_for_and_none_where_none(tiny_glm: Path):
    served, engine = scripted(tiny_glm, "</think>" + CALLS)
    with running(served) as found:
        client = openai.OpenAI(base_url=f"{found.url}/v1", api_key="-")
        single = client.chat.completions.create(**ASK, tools=TOOLS, parallel_tool_calls=False)
        none = client.chat.completions.create(**ASK, tools=TOOLS, tool_choice="none")
        client.close()
    assert len(single.choices[0].message.tool_calls or []) == 1
    assert none.choices[0].message.tool_calls is None
    assert none.choices[0].message.content is None
    assert none.choices[0].finish_reason == "stop"
    assert engine.prompts[0] == engine.prompts[1]  # the tools stay in the prompt


def test_a_whole_tool_loop_is_rendered(tiny_glm: Path):
    """The answer goes back as the client has it, and the template shows reasoning and call."""
    served, engine = scripted(tiny_glm, TEXT + CALLS)
    with running(served) as found:
        client = openai.OpenAI(base_url=f"{found.url}/v1", api_key="-")
        message = client.chat.completions.create(**ASK, tools=TOOLS).choices[0].message
        results: Any = [
            {"role": "tool", "tool_call_id": call.id, "content": f"result {number}"}
            for number, call in enumerate(message.tool_calls or [])
        ]
        messages = [*ASK["messages"], message.model_dump(), *results]
        client.chat.completions.create(**ASK | {"messages": messages}, tools=TOOLS)
        client.close()
    prompt = served.tokenizer.decode(engine.prompts[1])
    assert isinstance(prompt, str)
    assert prompt.endswith(
        "<|assistant|><think>" + TEXT.strip() + CALLS + "<|observation|>"
        "<tool_response>result 0</tool_response><tool_response>result 1</tool_response>"
        "<|assistant|><think>"
    )


def test_events_have_the_form_that_clients_parse(tiny_glm: Path):
    served, _ = scripted(tiny_glm, "</think>" + CALLS)
    body = ASK | {"tools": TOOLS, "stream": True, "stream_options": {"include_usage": True}}
    with running(served) as found:
        answer = httpx2.post(f"{found.url}/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end, rest = answer.text.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    documents = [json.loads(one.removeprefix("data: ")) for one in events]
    assert all(one["object"] == "chat.completion.chunk" for one in documents)
    assert documents[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert documents[-1]["choices"] == []
    assert documents[-1]["usage"]["total_tokens"] > 0
    assert documents[-2]["choices"][0]["delta"] == {}
    assert documents[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert all(one["usage"] is None for one in documents[:-1])
    calls = [
        call for one in documents[:-1] for call in one["choices"][0]["delta"].get("tool_calls", [])
    ]
    firsts = [call for call in calls if "id" in call]
    assert [call["index"] for call in firsts] == [0, 1]
    assert len({call["id"] for call in firsts}) == 2
    for call in calls:
        if call in firsts:
            assert (call["type"], call["function"]["arguments"]) == ("function", "")
        else:
            assert set(call) == {"index", "function"}
            assert set(call["function"]) == {"arguments"}


def test_defaults_of_the_server_hold_until_a_request_says_otherwise(tiny_glm: Path):
    served, engine = scripted(tiny_glm, "</think>x")
    served = replace(
        served, preferred={"temperature": 0.25, "top_k": 7},
        template_options={"enable_thinking": False},
    )  # fmt: skip
    with running(served) as found, httpx2.Client(base_url=found.url) as http:
        http.post("/v1/chat/completions", json=ASK)
        mine = {"temperature": 0.5, "chat_template_kwargs": {"enable_thinking": True}}
        http.post("/v1/chat/completions", json=ASK | mine)
    assert [(one.temperature, one.top_k) for one in engine.params] == [(0.25, 7), (0.5, 7)]
    ends = [str(served.tokenizer.decode(prompt[-1:])) for prompt in engine.prompts]
    assert ends == ["</think>", "<think>"]
