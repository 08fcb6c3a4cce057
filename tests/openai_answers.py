"""Answers of OpenAI's client in one form, streamed or not; for comparing the two."""

from typing import Any


def gather(chunks: Any) -> dict[int, dict[str, Any]]:
    """A stream put together: per choice, what a message would hold."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            own = found.setdefault(
                choice.index,
                {"content": "", "reasoning": "", "calls": {}, "finish": None, "logprobs": []},
            )
            delta = choice.delta.model_dump()
            own["content"] += delta.get("content") or ""
            own["reasoning"] += delta.get("reasoning") or ""
            assert delta.get("reasoning") == delta.get("reasoning_content")
            for call in delta.get("tool_calls") or []:
                if call.get("id"):
                    assert call["function"]["arguments"] == ""
                    own["calls"][call["index"]] = [call["function"]["name"], ""]
                own["calls"][call["index"]][1] += call["function"]["arguments"]
            if choice.logprobs:
                own["logprobs"] += [one.token for one in choice.logprobs.content]
            own["finish"] = choice.finish_reason or own["finish"]
    return found


def whole(completion: Any) -> dict[int, dict[str, Any]]:
    """The same of a completion that was not streamed."""
    found = {}
    for choice in completion.choices:
        message = choice.message.model_dump()
        calls = message.get("tool_calls") or []
        found[choice.index] = {
            "content": message["content"] or "",
            "reasoning": message.get("reasoning") or "",
            "calls": {
                number: [call["function"]["name"], call["function"]["arguments"]]
                for number, call in enumerate(calls)
            },
            "finish": choice.finish_reason,
            "logprobs": [one.token for one in choice.logprobs.content] if choice.logprobs else [],
        }
    return found
