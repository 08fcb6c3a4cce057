"""Requests of OpenAI's Responses API. Nothing is stored: a conversation comes whole each time."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from fourge.serve.protocol.fields import JsonObject, Label, PlainText, Strict


class Part(Strict):
    """A piece of text, whoever wrote it."""

    UNSUPPORTED: ClassVar = frozenset({"logprobs"})

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class Item(Strict):
    """What items have in common when they come back from an answer."""

    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class MessageItem(Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]


class CallItem(Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class CallOutputItem(Item):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Part]


class ReasoningItem(Item):
    """``encrypted_content`` is what this server made of the text; it is preferred to nothing."""

    type: Literal["reasoning"]
    summary: list[Part] = Field(default_factory=list)
    content: list[Part] = Field(default_factory=list)
    encrypted_content: str | None = None


class ResponseTool(Strict):
    """A function of the client's."""

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Strict):
    type: Literal["function"]
    name: str


class ReasoningOptions(Strict):
    """Summaries are not made: the reasoning itself is shown."""

    effort: Label | None = None
    summary: Literal["auto"] | None = None


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    name: str = ""
    description: str = ""
    definition: dict[str, Any] | bool = Field(alias="schema")
    strict: bool = True


class TextOptions(Strict):
    UNSUPPORTED: ClassVar = frozenset({"verbosity"})

    format: Annotated[PlainText | JsonObject | SchemaFormat, Field(discriminator="type")] = (
        PlainText(type="text")
    )


class ResponseStreamOptions(Strict):
    include_obfuscation: Literal[False] = False


class ResponsesRequest(Strict):
    """POST /v1/responses."""

    UNSUPPORTED: ClassVar = frozenset(
        {
            "background", "context_management", "conversation", "max_tool_calls", "moderation",
            "previous_response_id", "prompt", "top_logprobs",
        }
    )  # fmt: skip

    model: str
    input: str | list[MessageItem | CallItem | CallOutputItem | ReasoningItem]
    instructions: str = ""
    tools: list[ResponseTool] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedFunction = "auto"
    parallel_tool_calls: bool = True
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    reasoning: ReasoningOptions = Field(default_factory=ReasoningOptions)
    text: TextOptions = Field(default_factory=TextOptions)
    include: list[Literal["reasoning.encrypted_content"]] = Field(default_factory=list)
    stream: bool = False
    stream_options: ResponseStreamOptions = Field(default_factory=ResponseStreamOptions)
    store: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"
    service_tier: Literal["auto", "default"] = "auto"
    metadata: dict[str, Label] = Field(default_factory=dict)
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None

    @model_validator(mode="after")
    def _known_choice(self) -> "ResponsesRequest":
        names = {tool.name for tool in self.tools}
        if self.tool_choice not in ("auto", "none") and not names:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedFunction) and self.tool_choice.name not in names:
            raise ValueError(
                f"tool_choice names {self.tool_choice.name!r}, which is not among the tools"
            )
        return self
