"""Requests of OpenAI's chat completions and completions, and of /tokenize and /detokenize."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from fourge.serve.protocol.fields import (
    LARGE,
    MOST_CHOICES,
    Label,
    ResponseFormat,
    StopFields,
    StreamOptions,
    Strict,
)


class Message(Strict):
    """One message; chat/template.py says what its content may be.

    ``refusal``, ``annotations`` and ``audio`` come back from clients that send answers as they got
    them; only empty ones can be rendered.
    """

    UNSUPPORTED: ClassVar = frozenset({"refusal", "audio"})

    role: str
    content: str | list[Any] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    function_call: dict[str, Any] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class FunctionDefinition(Strict):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A function; defer_loading: known to the model by search only, if its template says so."""

    type: Literal["function"]
    function: FunctionDefinition
    defer_loading: bool | None = None


class FunctionName(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


class TemplateFields(Strict):
    """A conversation, and how the checkpoint's template is to render it."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] = Field(default_factory=list)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _one_ending(self) -> "TemplateFields":
        if self.continue_final_message:
            if self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set:
                raise ValueError(
                    "continue_final_message and add_generation_prompt exclude each other"
                )
            if self.messages[-1].role != "assistant":
                raise ValueError("continue_final_message needs an assistant's message at the end")
        return self

    def rendered_messages(self) -> list[dict[str, Any]]:
        """The messages as chat/template.py takes them."""
        return [
            message.model_dump(exclude_none=True, exclude={"annotations"})
            for message in self.messages
        ]

    def rendered_tools(self) -> list[dict[str, Any]]:
        """The tools in OpenAI form, without what was not given."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools]


class ChatRequest(TemplateFields, StopFields):
    """POST /v1/chat/completions. thinking_token_budget: after so many tokens the answer begins."""

    UNSUPPORTED: ClassVar = frozenset(
        {
            "audio", "best_of", "function_call", "functions", "modalities", "prediction",
            "priority", "prompt_logprobs", "verbosity", "web_search_options",
        }
    )  # fmt: skip

    model: str
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    max_tokens: int | None = Field(None, ge=1, description="Deprecated: max_completion_tokens.")
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    reasoning_effort: Label | None = None
    thinking_token_budget: int | None = Field(None, ge=0, le=LARGE)
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    metadata: dict[str, Label] = Field(default_factory=dict)
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"

    @model_validator(mode="after")
    def _together(self) -> "ChatRequest":
        if not self.add_generation_prompt and not self.continue_final_message:
            raise ValueError(
                "add_generation_prompt is false, and so is continue_final_message: one must be true"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.tool_choice in ("auto", "none"):
            return self
        names = {tool.function.name for tool in self.tools}
        if not names:
            raise ValueError("tool_choice needs tools")
        wanted = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        if wanted is not None and wanted not in names:
            raise ValueError(f"tool_choice names {wanted!r}, which is not among the tools")
        return self

    @property
    def most_tokens(self) -> int | None:
        """Of the answer; None: as many as the context has room for."""
        given = self.max_completion_tokens
        return self.max_tokens if given is None else given


class CompletionRequest(StopFields):
    """POST /v1/completions. max_tokens 0 (with echo) only describes the prompt."""

    UNSUPPORTED: ClassVar = frozenset({"best_of", "priority", "suffix"})

    model: str
    prompt: (
        str
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=256)]
        | Annotated[list[list[int]], Field(min_length=1, max_length=256)]
    )
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    # OpenAI's own default; lm-eval and others rely on it.
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    response_format: ResponseFormat | None = None
    user: Label | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several texts or token lists, always as a list."""
        given = self.prompt
        if isinstance(given, str) or isinstance(given[0], int):
            return [given]  # type: ignore[list-item]
        return list(given)  # type: ignore[arg-type]


class TokenizePrompt(Strict):
    """POST /tokenize of a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeMessages(TemplateFields):
    """POST /tokenize of a conversation."""

    model: str | None = None
    return_token_strs: bool = False


class AbortRequest(Strict):
    """POST /abort: requests by their X-Request-Id, or all of them."""

    request_ids: list[str] | None = None
    abort_all: bool = False

    @model_validator(mode="after")
    def _says_which(self) -> "AbortRequest":
        if (self.request_ids is None) != self.abort_all:
            raise ValueError("give either request_ids or abort_all")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]
