"""A request as a surface has read it -> a job for the engine: tokens, parameters, how to parse.

Everything that can be refused is refused here, before an answer begins. Slow (templates,
tokenizing, grammars), so it runs in one worker thread; never on the event loop.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fourge.chat.reasoning import leaves_thinking_open
from fourge.chat.template import normalise, render, unknown_options
from fourge.chat.tokens import encode
from fourge.engine.params import SamplingParams, StructuredOutputs
from fourge.errors import RequestError
from fourge.serve.constraints import Format, Reasoning, ToolChoice, constraint
from fourge.serve.served import Served


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages and tools in OpenAI form. ``effort``: how much to think; "none" is not at all.
    ``thinking_budget``: the most tokens to think with.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    response_format: Format = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    effort: str | None = None
    thinking_budget: int | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool = True


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """``params``: arguments of SamplingParams. ``n`` answers, each with the next seed."""

    params: Mapping[str, Any] = field(default_factory=dict)
    n: int = 1
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    bad_words: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Parsing:
    """How an answer is told apart into reasoning, content and calls."""

    tools: Sequence[Mapping[str, Any]]
    thinking: bool
    tool_choice: ToolChoice
    parallel_tool_calls: bool
    spelled: bool  # tags may be spelled by ordinary tokens (constraints.py)


@dataclass(frozen=True, kw_only=True)
class Job:
    """``choices``: for each answer which prompt it belongs to, and its parameters. Without
    ``parsing`` the answer is plain text.
    """

    prompts: Sequence[Sequence[int]]
    choices: Sequence[tuple[int, SamplingParams]]
    sampling: Sampling
    parsing: Parsing | None = None

    @property
    def grammar(self) -> StructuredOutputs | None:
        """What all answers must look like."""
        return self.choices[0][1].structured_outputs


def chat_job(served: Served, conversation: Conversation, sampling: Sampling) -> Job:
    """FourgeError subclasses: the request cannot be served."""
    text = prompt_text(served, conversation)
    thinking = leaves_thinking_open(text)
    reasoning = Reasoning(served.tag_ids, conversation.thinking_budget) if thinking else None
    structured, spelled = constraint(
        conversation.tools,
        conversation.tool_choice,
        conversation.response_format,
        parallel=conversation.parallel_tool_calls,
        reasoning=reasoning,
    )
    parsing = Parsing(
        tools=conversation.tools,
        thinking=thinking,
        tool_choice=conversation.tool_choice,
        parallel_tool_calls=conversation.parallel_tool_calls,
        spelled=spelled,
    )
    prompt = _tokens(served, text, rendered=True)
    return _job(served, [prompt], sampling, structured=structured, parsing=parsing)


def text_job(
    served: Served,
    prompts: Sequence[str | Sequence[int]],
    sampling: Sampling,
    structured: StructuredOutputs | None,
) -> Job:
    """The same for plain prompts, as texts or as tokens."""
    tokens = [
        _tokens(served, prompt, rendered=False) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]
    return _job(served, tokens, sampling, structured=structured, parsing=None)


def prompt_text(served: Served, conversation: Conversation) -> str:
    """The conversation in the checkpoint's own template."""
    messages = normalise(list(conversation.messages), conversation.tools)
    return render(
        served.tokenizer,
        messages,
        conversation.tools,
        add_generation_prompt=conversation.add_generation_prompt
        and not conversation.continue_final_message,
        continue_final_message=conversation.continue_final_message,
        options=_template_options(served, conversation),
    )


def _tokens(served: Served, text: str, *, rendered: bool) -> list[int]:
    """RequestError: it is so long that nothing is gained by counting its tokens."""
    most = served.most_characters
    if most is not None and len(text) > most:
        raise RequestError(
            f"the prompt has {len(text)} characters, which are more than {served.max_model_len}"
            " tokens (max_model_len): shorten it."
        )
    return encode(served.tokenizer, text, rendered=rendered)


def _forbidden(served: Served, words: Sequence[str]) -> list[list[int]]:
    """The tokens of every word at the beginning of a text and within one (vllm 0.33.0
    sampling_params.py does the same)."""
    texts = [prefix + word.lstrip() for word in words for prefix in ("", " ")]
    return [encode(served.tokenizer, text, rendered=True) for text in texts]


def _template_options(served: Served, conversation: Conversation) -> dict[str, Any]:
    """Of the server, of the effort, of the request; the last one wins."""
    options = dict(served.template_options)
    effort = conversation.effort
    if effort is not None:
        known = ("enable_thinking", "reasoning_effort")
        unknown = unknown_options(served.tokenizer, known)
        if "reasoning_effort" not in unknown and effort != "none":
            options["reasoning_effort"] = effort
        if effort == "none" or "enable_thinking" not in unknown:
            options["enable_thinking"] = effort != "none"
    return options | dict(conversation.template_options)


def _job(
    served: Served, prompts: Sequence[Sequence[int]], sampling: Sampling, *,
    structured: StructuredOutputs | None, parsing: Parsing | None,
) -> Job:  # fmt: skip
    given = {**served.preferred, **sampling.params}
    if sampling.bad_words:
        given["bad_words_token_ids"] = _forbidden(served, sampling.bad_words)
    params = SamplingParams(**given, structured_outputs=structured)
    for prompt in prompts:
        served.check(prompt, params)
    choices = [
        (number, replace(params, seed=params.seed + offset) if params.seed is not None else params)
        for number in range(len(prompts))
        for offset in range(sampling.n)
    ]
    return Job(prompts=prompts, choices=choices, sampling=sampling, parsing=parsing)
