"""Does a server that has just started work? A few requests that find what usually breaks.

Short and long prompts (sparse attention only selects beyond index_topk tokens, so that a broken
indexer shows nowhere else), streamed tool calls without and with typed arguments, text that is not
ASCII (damaged scales show in broken UTF-8 first), and how many drafts the model accepts.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2

TIMEOUT_S = 600.0
ANSWER_TOKENS = 256
NEEDLE = "7Q4-ZEBRA"
KOREAN = "빠른 갈색 여우가 게으른 개를 뛰어넘는다"
FILLER = "The committee met again on Tuesday, read the minutes, and adjourned without a decision. "
FILLER_TOKENS = 14  # about, per sentence
# Beyond the selection by so much, so that most of the prompt is not selected.
BEYOND = 2048
# At the first position; a broken MTP path accepts 0.06, a sound one 0.8 (rtx6kpro notebooks).
LOWEST_ACCEPTANCE = 0.3
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

CLOCK = {
    "name": "get_time",
    "description": "The current time. Takes no arguments.",
    "parameters": {"type": "object", "properties": {}},
}
ALARM = {
    "name": "set_alarm",
    "description": "Set an alarm.",
    "parameters": {
        "type": "object",
        "properties": {
            "hour": {"type": "integer"},
            "label": {"type": "string"},
            "repeat": {"type": "boolean"},
        },
        "required": ["hour", "label", "repeat"],
    },
}
TYPES = {"hour": int, "label": str, "repeat": bool}


@dataclass(frozen=True, slots=True)
class Target:
    """A server to test, and what is known of its model."""

    url: str
    model: str
    api_key: str | None
    index_topk: int  # 0 without sparse attention
    context: int
    drafts: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one check ended; ``passed`` is None where it does not apply."""

    name: str
    passed: bool | None
    detail: str
    seconds: float


@dataclass
class Call:
    """A streamed answer, put together."""

    text: str = ""
    name: str = ""
    arguments: str = ""
    finish: str = ""
    pieces: int = 0
    others: list[str] = field(default_factory=list)  # further tool calls


def smoke_test(target: Target) -> Iterator[Outcome]:
    """The outcomes, one by one."""
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    with httpx2.Client(
        base_url=target.url, headers=headers, timeout=TIMEOUT_S, trust_env=False
    ) as client:
        for name, check in CHECKS:
            start = time.monotonic()
            try:
                passed, detail = check(client, target)
            except (httpx2.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
                passed, detail = False, f"{type(error).__name__}: {error}"
            yield Outcome(name, passed, detail, round(time.monotonic() - start, 2))


Verdict = tuple[bool | None, str]


def _short(client: httpx2.Client, target: Target) -> Verdict:
    text, _ = _answer(client, target, "What is 17 plus 25? Answer with the number alone.")
    return _sound(text, "42")


def _long(client: httpx2.Client, target: Target) -> Verdict:
    wanted = target.index_topk + BEYOND
    if not target.index_topk:
        return None, "the model has no sparse attention"
    if target.context < wanted + ANSWER_TOKENS + 256:
        return None, f"a context of {target.context:,} tokens has no room beyond index_topk"
    sentences = wanted // FILLER_TOKENS + 1
    half = FILLER * (sentences // 2)
    prompt = f"{half}The access code is {NEEDLE}. {half}\nWhat is the access code? Answer briefly."
    text, tokens = _answer(client, target, prompt)
    passed, detail = _sound(text, NEEDLE)
    if tokens <= target.index_topk:
        return False, f"the prompt had {tokens:,} tokens only, index_topk is {target.index_topk:,}"
    return passed, f"{tokens:,} tokens; {detail}"


def _zero_arguments(client: httpx2.Client, target: Target) -> Verdict:
    call = _stream(client, target, "What time is it? Use the tool.", CLOCK)
    if call.name != "get_time":
        return False, f"no call of get_time: {call.name or _clip(call.text)!r}"
    if json.loads(call.arguments or "null") != {}:
        return False, f"its arguments are {call.arguments!r}, needed is an empty object"
    return _finished(call, "get_time()")


def _typed_arguments(client: httpx2.Client, target: Target) -> Verdict:
    question = "Set a daily alarm at 7 o'clock with the label 'run'. Use the tool."
    call = _stream(client, target, question, ALARM)
    if call.name != "set_alarm":
        return False, f"no call of set_alarm: {call.name or _clip(call.text)!r}"
    arguments = json.loads(call.arguments)
    for key, kind in TYPES.items():
        if type(arguments.get(key)) is not kind:
            return False, f"{key} is {arguments.get(key)!r}, needed is {kind.__name__}"
    return _finished(call, f"set_alarm({call.arguments})")


def _finished(call: Call, shown: str) -> Verdict:
    if call.others:
        return False, f"{shown}, and further calls: {', '.join(call.others)}"
    if call.finish != "tool_calls":
        return False, f"{shown}, but finish_reason is {call.finish!r}"
    return True, f"{shown} in {call.pieces} pieces"


def _not_ascii(client: httpx2.Client, target: Target) -> Verdict:
    text, _ = _answer(client, target, f"Repeat this sentence exactly: {KOREAN}")
    return _sound(text, KOREAN)


def _acceptance(client: httpx2.Client, target: Target) -> Verdict:
    if not target.drafts:
        return None, "MTP is off"
    response = client.get("/metrics", follow_redirects=True)
    response.raise_for_status()
    rate = acceptance(response.text)
    if rate is None:
        return False, "no drafts are counted in /metrics"
    shown = f"{rate:.2f} of the drafts are accepted, at least {LOWEST_ACCEPTANCE} are expected"
    return rate >= LOWEST_ACCEPTANCE, shown


CHECKS: tuple[tuple[str, Callable[[httpx2.Client, Target], Verdict]], ...] = (
    ("short prompt", _short),
    ("long prompt", _long),
    ("tool call without arguments", _zero_arguments),
    ("tool call with types", _typed_arguments),
    ("text beyond ASCII", _not_ascii),
    ("MTP acceptance", _acceptance),
)


def acceptance(metrics: str) -> float | None:
    """The share of drafts accepted at the first position, from either engine's metrics.

    vLLM counts accepted tokens per position and drafts; SGLang has a rate over all positions.
    """
    first = _sum(metrics, r'vllm:spec_decode_num_accepted_tokens_per_pos_total\{[^}]*position="0"')
    drafts = _sum(metrics, r"vllm:spec_decode_num_drafts_total\b")
    if first is not None and drafts:
        return first / drafts
    rates = [float(value) for value in re.findall(
        r"^sglang:spec_accept_rate(?:\{[^}]*\})? (\S+)", metrics, re.MULTILINE
    )]  # fmt: skip
    return sum(rates) / len(rates) if rates else None


def _sum(metrics: str, name: str) -> float | None:
    values = re.findall(rf"^{name}(?:[^\s}}]*\}})? (\S+)", metrics, re.MULTILINE)
    return sum(map(float, values)) if values else None


def _sound(text: str, wanted: str) -> Verdict:
    """Whether an answer holds what was asked for, and shows no damage."""
    if REPLACEMENT in text:
        return False, f"broken UTF-8: {_clip(text)!r}"
    if re.search(r"(.)\1{15}", text.replace(" ", "")):
        return False, f"one character over and over: {_clip(text)!r}"
    if wanted not in text:
        return False, f"{wanted!r} is not in {_clip(text)!r}"
    return True, f"answered {_clip(text)!r}"


def _clip(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _body(target: Target, content: str) -> dict[str, Any]:
    return {
        "model": target.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "chat_template_kwargs": {"enable_thinking": False},
    }


def _answer(client: httpx2.Client, target: Target, content: str) -> tuple[str, int]:
    """The text of an answer, and how many tokens the prompt had."""
    response = client.post("/v1/chat/completions", json=_body(target, content))
    if response.status_code != httpx2.codes.OK:
        raise ValueError(f"status {response.status_code}: {_clip(response.text)}")
    document = response.json()
    return document["choices"][0]["message"]["content"] or "", document["usage"]["prompt_tokens"]


def _stream(client: httpx2.Client, target: Target, content: str, tool: dict[str, Any]) -> Call:
    body = _body(target, content) | {
        "stream": True,
        "tools": [{"type": "function", "function": tool}],
        "tool_choice": "auto",
    }
    call = Call()
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != httpx2.codes.OK:
            response.read()
            raise ValueError(f"status {response.status_code}: {_clip(response.text)}")
        for line in response.iter_lines():
            data = line.removeprefix("data:").strip()
            if line.startswith("data:") and data != "[DONE]":
                _add(call, json.loads(data))
    return call


def _add(call: Call, chunk: dict[str, Any]) -> None:
    for choice in chunk.get("choices", ()):
        delta = choice.get("delta") or {}
        call.text += delta.get("content") or ""
        call.finish = choice.get("finish_reason") or call.finish
        for piece in delta.get("tool_calls") or ():
            function = piece.get("function") or {}
            if piece.get("index", 0) > 0:
                call.others += [function["name"]] if function.get("name") else []
                continue
            call.name += function.get("name") or ""
            call.arguments += function.get("arguments") or ""
            call.pieces += 1
