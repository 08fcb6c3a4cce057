"""An engine that says what it is told, with the interface of AsyncEngine; for tests of serving."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourge.chat.tokens import load_tokenizer
from fourge.engine.async_engine import Result, Spent, Update
from fourge.engine.params import Defaults, SamplingParams, StructuredOutputs, resolved
from fourge.serve.served import Served

EOS = 2027  # <|endoftext|> of the example's tokenizer


@dataclass
class ScriptedEngine:
    """Gives the next of ``scripts`` (tokens) to every request, ``stride`` tokens a step.

    ``prompts`` and ``params`` are what was asked; ``under_way`` counts requests that go on.
    """

    scripts: list[list[int]]
    stride: int = 1
    pause_s: float = 0.0
    compile_s: float = 0.0
    finish: str = "stop"
    prompts: list[list[int]] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    under_way: int = 0
    is_alive: bool = True

    def begin(
        self, prompt: Sequence[int], params: SamplingParams, receive: Callable[[Result], None]
    ) -> Callable[[], None]:
        script = self.scripts[len(self.prompts) % len(self.scripts)]
        self.prompts.append(list(prompt))
        self.params.append(params)
        tokens = [*script, EOS] if self.finish == "stop" else script
        saying = asyncio.create_task(self._say(tokens, min(64, len(prompt)), receive))

        def leave() -> None:
            saying.cancel()

        return leave

    async def _say(
        self, tokens: list[int], num_cached: int, receive: Callable[[Result], None]
    ) -> None:
        self.under_way += 1
        try:
            for start in range(0, len(tokens), self.stride):
                await asyncio.sleep(self.pause_s)
                end = start + self.stride
                reason = self.finish if end >= len(tokens) else None
                receive(Update(tokens[start:end], [], reason, Spent(num_cached=num_cached)))
        finally:
            self.under_way -= 1

    async def compile(self, wanted: StructuredOutputs) -> None:
        """Takes its time; it says what it says."""
        await asyncio.sleep(self.compile_s)

    def stats(self) -> dict[str, Any]:
        counters = dict.fromkeys(
            ("prompt_tokens", "cached_prompt_tokens", "output_tokens", "preemptions", "drafts",
             "draft_tokens", "accepted_tokens", "waiting", "cache_tokens"), 0,
        )  # fmt: skip
        return counters | {"running": self.under_way, "cache_usage": 0.0}

    def close(self) -> None:
        self.is_alive = False


def scripted(folder: Path, *texts: str, **options: Any) -> tuple[Served, ScriptedEngine]:
    """A model that answers with ``texts``, one after the other, and its engine."""
    tokenizer = load_tokenizer(folder)
    engine = ScriptedEngine([tokenizer.encode(text) for text in texts], **options)
    defaults = Defaults(eos_token_ids=frozenset({EOS}))
    served = Served(
        names=("tiny-glm", "glm"),
        tokenizer=tokenizer,
        engine=engine,
        check=lambda prompt, params: resolved(params, defaults, 2048),
        vocab_size=2048,
        max_model_len=4096,
        max_num_seqs=8,
    )
    return served, engine
