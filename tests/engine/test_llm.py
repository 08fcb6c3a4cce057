"""The Python API on the example model, structured output, and the engine for servers."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import xgrammar

from engine_models import SMALL, greedy, serve
from fourge import LLM, SamplingParams, StructuredOutputs
from fourge.engine.async_engine import AsyncEngine
from fourge.engine.engine import Engine
from fourge.errors import EngineError, RequestError

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["cat", "dog"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "kind", "legs"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "read_file",
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string", "maxLength": 8}},
            "required": ["path"],
        },
    },
}
TEXTS = ["def main(", "The weather in Berlin is", "Hello"]


@pytest.fixture(scope="module", params=[0, 3], ids=["plain", "speculating"])
def llm(request: pytest.FixtureRequest, tiny_glm: Path) -> LLM:
    return LLM(tiny_glm, device="cpu", cache_tokens=4096, speculative_tokens=request.param)


def test_the_names_come_without_torch_being_loaded_first() -> None:
    code = (
        "import sys, fourge; assert 'torch' not in sys.modules;"
        "from fourge import SamplingParams; assert 'transformers' not in sys.modules;"
        "assert SamplingParams(top_k=3).top_k == 3"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_texts_and_tokens_give_the_same_completions(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=10, logprobs=2)
    texts = llm.generate(TEXTS, params)
    assert llm.tokenizer is not None
    tokens = llm.generate([llm.tokenizer(text)["input_ids"] for text in TEXTS], params)
    for one, other in zip(texts, tokens, strict=True):
        assert one.token_ids == other.token_ids
        assert one.text == llm.tokenizer.decode(one.token_ids, skip_special_tokens=True)
        assert one.logprobs is not None
        assert [own.token_id for own in one.logprobs] == one.token_ids
        assert one.finish_reason in ("length", "stop")
        assert one.stats.prompt_tokens == len(one.prompt_token_ids)
        assert one.stats.output_tokens == len(one.token_ids) <= 10
        assert one.stats.first_token_s is not None
        assert 0 < one.stats.first_token_s <= one.stats.total_s
    assert llm.stats()["finished"] >= 6


def test_each_prompt_may_have_its_own_params(llm: LLM) -> None:
    params = [
        SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (1, 5, 3)
    ]
    assert [len(one.token_ids) for one in llm.generate(TEXTS, params)] == [1, 5, 3]
    with pytest.raises(RequestError, match="3 prompts and 2 SamplingParams"):
        llm.generate(TEXTS, params[:2])


def test_one_bad_prompt_refuses_all_before_any_is_begun(llm: LLM) -> None:
    before = llm.stats()["steps"]
    with pytest.raises(RequestError, match="prompt is empty"):
        llm.generate(["fine", ""])
    with pytest.raises(RequestError, match="list of texts"):
        llm.generate("a text alone")
    assert (llm.stats()["steps"], llm.engine.has_work) == (before, False)
    assert llm.generate([[5]], SamplingParams(max_tokens=1))[0].token_ids


def test_an_interruption_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step = llm.engine.step
    calls = iter([None, None])

    def interrupted() -> Any:
        if next(calls, "over") == "over":
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(TEXTS, SamplingParams(max_tokens=50, ignore_eos=True))
    assert (llm.engine.has_work, llm.stats()["cache_usage"]) == (False, 0)


def test_json_follows_its_schema(llm: LLM) -> None:
    params = [
        SamplingParams(
            temperature=temperature, seed=number, max_tokens=300,
            structured_outputs=StructuredOutputs(json=SCHEMA),
        )
        for number, temperature in enumerate((0.8, 1.0, 1.5))
    ]  # fmt: skip
    completions = [one for one in llm.generate(TEXTS, params) if one.finish_reason == "stop"]
    assert completions
    for one in completions:
        value = json.loads(one.text or "")
        assert set(value) == {"name", "kind", "legs"}
        assert value["kind"] in ("cat", "dog")
        assert 0 <= value["legs"] <= 99


def test_text_matches_its_expression_beside_requests_without_one(llm: LLM) -> None:
    wanted = StructuredOutputs(regex=r"[a-f]{3}-[0-9]{4}")
    params = [
        SamplingParams(temperature=1.0, seed=number, max_tokens=40, structured_outputs=own)
        for number, own in enumerate((wanted, None, wanted))
    ]
    first, free, third = llm.generate(TEXTS, params)
    alone = llm.generate(TEXTS[1:2], params[1])[0]
    assert alone.token_ids == free.token_ids
    for one in (first, third):
        assert re.fullmatch(r"[a-f]{3}-[0-9]{4}", one.text or "")
        assert one.finish_reason == "stop"


def test_a_tool_call_follows_the_models_own_form(llm: LLM) -> None:
    tag = xgrammar.get_model_structural_tag(
        model="glm_4_7", tools=[TOOL], tool_choice="required", reasoning="disabled"
    )
    params = SamplingParams(
        temperature=0.8, seed=3, max_tokens=200,
        structured_outputs=StructuredOutputs(structural_tag=tag),
    )  # fmt: skip
    (one,) = llm.generate(["Read it."], params)
    assert llm.tokenizer is not None
    text = llm.tokenizer.decode(one.token_ids)
    argument = r"<arg_key>path</arg_key><arg_value>.{0,8}</arg_value>"
    pattern = rf"\s*(<tool_call>read_file{argument}</tool_call>\s*)+"
    assert one.finish_reason == "stop"
    assert re.match(pattern, text, re.DOTALL), text


def test_a_malformed_grammar_is_refused(llm: LLM) -> None:
    for wanted in (StructuredOutputs(regex="("), StructuredOutputs(json='{"type": 3}')):
        with pytest.raises(RequestError, match="structured_outputs cannot be used"):
            llm.generate(["a"], SamplingParams(structured_outputs=wanted))
    with pytest.raises(RequestError, match="has 2 of json, regex"):
        StructuredOutputs(json={}, regex="a")
    assert not llm.engine.has_work


@pytest.fixture
def served(model: Path) -> Iterator[AsyncEngine]:
    with AsyncEngine(Engine(model, **SMALL)) as engine:
        yield engine


async def collect(engine: AsyncEngine, prompt: list[int], **options: Any) -> tuple[list[int], Any]:
    tokens: list[int] = []
    async for progressed in engine.generate(prompt, greedy(**options)):
        tokens += progressed.token_ids
        reason = progressed.finish_reason
    return tokens, reason


def test_streams_of_one_time_give_what_each_gives_alone(served: AsyncEngine, model: Path) -> None:
    prompts = [[number + 1] * (3 * number + 1) for number in range(5)]
    expected = [one.output for one in serve(Engine(model, **SMALL), prompts, greedy())]

    async def together() -> list[tuple[list[int], Any]]:
        return await asyncio.gather(*(collect(served, prompt) for prompt in prompts))

    assert asyncio.run(together()) == [(tokens, "length") for tokens in expected]


def test_leaving_a_stream_frees_its_place(served: AsyncEngine) -> None:
    async def leave() -> None:
        async with aclosing(served.generate([1, 2], greedy(max_tokens=3000))) as updates:
            async for _ in updates:
                break
        results: list[Any] = []
        served.begin([1, 2], greedy(max_tokens=3000), results.append)()
        assert results == []

    asyncio.run(leave())
    assert asyncio.run(collect(served, [5], max_tokens=2))[1] == "length"
    stats = served.stats()
    assert (stats["running"], stats["cache_usage"], stats["finished"]) == (0, 0, 3)


def test_a_refused_request_and_a_failed_step_leave_the_engine_going(
    served: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused() -> None:
        with pytest.raises(RequestError, match="prompt is empty"):
            await collect(served, [])

    asyncio.run(refused())
    engine = served._engine
    with monkeypatch.context() as patch:

        def fail(chunks: Any, newest: Any) -> Any:
            raise RuntimeError("out of memory")

        patch.setattr(engine._runner, "target", fail)
        assert asyncio.run(collect(served, [1, 2])) == ([], "error")
    assert asyncio.run(collect(served, [1, 2], max_tokens=2))[1] == "length"


def test_a_closed_engine_says_so(model: Path) -> None:
    engine = AsyncEngine(Engine(model, **SMALL))

    async def close_on_the_way() -> None:
        async for _ in engine.generate([1], greedy(max_tokens=3000)):
            await asyncio.to_thread(engine.close)

    with pytest.raises(EngineError, match="was closed"):
        asyncio.run(close_on_the_way())
    with pytest.raises(EngineError, match="was closed"):
        asyncio.run(collect(engine, [1]))
