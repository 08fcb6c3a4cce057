"""Deltas -> the output items of the Responses API, and the events that tell of their growth.

An answer that is not streamed is what the same events add up to.
"""

import base64
import uuid
from collections.abc import Iterator
from typing import Any

from fourge.chat.deltas import Delta

Event = dict[str, Any]


class OutputItems:
    """Grows with every delta. ``encrypt``: reasoning also in the opaque form that clients ask for
    to send it back (readable to whoever decodes it: nothing here is a secret)."""

    def __init__(self, *, encrypt: bool) -> None:
        self.items: list[dict[str, Any]] = []
        self._encrypt = encrypt
        self._open: str | int | None = None  # the kind of the last item; of a call its number

    def take(self, delta: Delta) -> Iterator[Event]:
        """The events of one delta."""
        if delta.reasoning is not None:
            kind, text = "reasoning", delta.reasoning
        elif delta.content is not None:
            kind, text = "message", delta.content
        else:
            kind, text = delta.index, delta.arguments or ""
        if kind != self._open:
            yield from self.close("completed")
            yield from self._begin(kind, delta)
        if text:
            yield self._grow(text)

    def close(self, status: str) -> Iterator[Event]:
        """The last item ends."""
        if self._open is None:
            return
        item, place = self.items[-1], self._place()
        item["status"] = status
        if item["type"] == "function_call":
            yield place | {
                "type": "response.function_call_arguments.done",
                "name": item["name"],
                "arguments": item["arguments"],
            }
        else:
            part = item["content"][0]
            kind = part["type"]
            done = {"type": f"response.{kind}.done", "content_index": 0, "text": part["text"]}
            yield place | done | ({"logprobs": []} if kind == "output_text" else {})
            yield place | {"type": "response.content_part.done", "content_index": 0, "part": part}
        if item["type"] == "reasoning" and self._encrypt:
            text = item["content"][0]["text"]
            item["encrypted_content"] = encrypted(text)
        yield {
            "type": "response.output_item.done",
            "output_index": len(self.items) - 1,
            "item": item,
        }
        self._open = None

    def _begin(self, kind: str | int | None, delta: Delta) -> Iterator[Event]:
        self._open = kind
        part: dict[str, Any] | None = None
        if kind == "reasoning":
            part = {"type": "reasoning_text", "text": ""}
            item = {"id": f"rs_{uuid.uuid4().hex}", "type": "reasoning", "summary": []}
        elif kind == "message":
            part = {"type": "output_text", "text": "", "annotations": []}
            item = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant"}
        else:
            item = {
                "id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": delta.id,
                "name": delta.name, "arguments": "",
            }  # fmt: skip
        item["status"] = "in_progress"
        shown = item | ({} if part is None else {"content": []})
        self.items.append(item | ({} if part is None else {"content": [part]}))
        index = len(self.items) - 1
        yield {"type": "response.output_item.added", "output_index": index, "item": shown}
        if part is not None:
            added = {"type": "response.content_part.added", "content_index": 0, "part": dict(part)}
            yield self._place() | added

    def _grow(self, text: str) -> Event:
        item = self.items[-1]
        if item["type"] == "function_call":
            item["arguments"] += text
            kind, place = "function_call_arguments", self._place()
        else:
            part = item["content"][0]
            part["text"] += text
            kind, place = part["type"], self._place() | {"content_index": 0}
        event = place | {"type": f"response.{kind}.delta", "delta": text}
        return event | ({"logprobs": []} if kind == "output_text" else {})

    def _place(self) -> Event:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}


def encrypted(text: str) -> str:
    """The opaque form of reasoning."""
    return base64.b64encode(text.encode()).decode()


def decrypted(text: str) -> str | None:
    """What ``encrypted`` was given; None if it was not this server's."""
    try:
        return base64.b64decode(text, validate=True).decode()
    except ValueError:
        return None
