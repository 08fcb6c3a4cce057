"""The Responses API through OpenAI's own client: events, items, tools."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from scripted_engine import ScriptedEngine, scripted
from serving import Running, running

SPEECH = (
    "I think.</think>Let me see."
    "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>"
    "<tool_call>get_time</tool_call>"
)
TOOLS: Any = [
    {
        "type": "function",
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
    {"type": "function", "name": "get_time", "parameters": {"type": "object", "properties": {}}},
]


@pytest.fixture
def speaking(tiny_glm: Path) -> Iterator[tuple[Running, ScriptedEngine]]:
    served, engine = scripted(tiny_glm, SPEECH, stride=2)
    with running(served) as found:
        yield found, engine


@pytest.fixture
def codex(speaking: tuple[Running, ScriptedEngine]) -> Iterator[openai.OpenAI]:
    url = f"{speaking[0].url}/v1"
    with openai.OpenAI(base_url=url, api_key="-", max_retries=0) as found:
        yield found


def shown(response: Any) -> list[tuple[str, str]]:
    """Type and text of every item."""
    return [
        (item.type, item.arguments if item.type == "function_call" else item.content[0].text)
        for item in response.output
    ]


def test_a_stream_adds_up_to_the_response(codex: openai.OpenAI):
    once = codex.responses.create(model="glm", input="Hi", tools=TOOLS)
    assert shown(once) == [
        ("reasoning", "I think."),
        ("message", "Let me see."),
        ("function_call", '{"city": "Paris"}'),
        ("function_call", "{}"),
    ]
    assert (once.status, once.output_text) == ("completed", "Let me see.")
    with codex.responses.stream(model="glm", input="Hi", tools=TOOLS) as stream:
        events = list(stream)
        streamed = stream.get_final_response()
    assert shown(streamed) == shown(once)
    assert streamed.usage == once.usage
    assert [one.sequence_number for one in events] == sorted(one.sequence_number for one in events)
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    types = [one.type for one in events]
    for kind in ("output_item.added", "output_item.done"):
        assert types.count(f"response.{kind}") == 4  # type: ignore[arg-type]


def test_an_answer_goes_back_with_the_nulls_of_its_client(codex: openai.OpenAI):
    first = codex.responses.create(model="glm", input="Hi", tools=TOOLS)
    items: Any = [{"role": "user", "content": "Hi"}, *(one.model_dump() for one in first.output)]
    items += [
        {"type": "function_call_output", "call_id": one["call_id"], "output": "done"}
        for one in items
        if one.get("type") == "function_call"
    ]
    assert codex.responses.create(model="glm", input=items, tools=TOOLS).status == "completed"


def test_an_answer_goes_back_as_it_came(
    codex: openai.OpenAI, speaking: tuple[Running, ScriptedEngine]
):
    include: Any = ["reasoning.encrypted_content"]
    first = codex.responses.create(
        model="glm", input="Hi", tools=TOOLS, include=include, store=False,
        reasoning={"effort": "medium", "summary": "auto"},
    )  # fmt: skip
    items: list[Any] = [item.model_dump(exclude_none=True) for item in first.output]
    items[0]["content"] = []  # a client that keeps the opaque form alone
    results: list[Any] = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "sunny"}
        for item in items
        if item["type"] == "function_call"
    ]
    codex.responses.create(
        model="glm", tools=TOOLS, instructions="Be brief.",
        input=[{"role": "user", "content": "Hi"}, *items, *results],
    )  # fmt: skip
    prompt = str(speaking[0].service.served.tokenizer.decode(speaking[1].prompts[-1]))
    assert prompt.endswith(
        "<|system|>Be brief.<|user|>Hi<|assistant|><think>" + SPEECH + "<|observation|>"
        "<tool_response>sunny</tool_response><tool_response>sunny</tool_response>"
        "<|assistant|><think>"
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id' is not supported"),
        ({"store": True}, "store"),
        ({"tools": [{"type": "web_search"}]}, "function"),
        ({"inputs": 1}, "did you mean input?"),
        ({"input": [{"type": "reasoning", "encrypted_content": "@@"}]}, "not of this server"),
    ],
)
def test_what_is_not_supported_is_named(codex: openai.OpenAI, changes: Any, says: str):
    with pytest.raises(openai.BadRequestError, match=says.replace("?", r"\?")):
        codex.responses.create(model="glm", input="Hi", extra_body=changes)


def test_a_real_engine_is_cut_and_bound_to_a_tool(client: openai.OpenAI):
    cut = client.responses.create(model="tiny-glm", input="Hi", max_output_tokens=6)
    assert (cut.status, cut.output[-1].status) == ("incomplete", "incomplete")  # type: ignore[union-attr]
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"
    assert cut.usage is not None
    assert cut.usage.output_tokens == 6
    choice: Any = {"type": "function", "name": "get_time"}
    called = client.responses.create(
        model="tiny-glm", input="Hi", tools=TOOLS, tool_choice=choice, max_output_tokens=200,
        reasoning={"effort": "none"},
    )  # fmt: skip
    assert [item.type for item in called.output] == ["function_call"]


def test_a_failure_is_the_last_event(tiny_glm: Path):
    served, _ = scripted(tiny_glm, "a b c", finish="error")
    with running(served) as found:
        client = openai.OpenAI(base_url=f"{found.url}/v1", api_key="-", max_retries=0)
        events = list(client.responses.create(model="glm", input="Hi", stream=True))
        client.close()
    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None
    assert "engine" in events[-1].response.error.message
