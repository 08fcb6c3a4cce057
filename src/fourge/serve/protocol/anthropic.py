"""Requests of Anthropic's Messages API."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from fourge.serve.protocol.fields import Label, Strict


class CacheControl(Strict):
    """Every prefix is cached here, so that the mark asks for nothing more."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] = "5m"


class Block(Strict):
    """A part that may carry a mark of the cache."""

    cache_control: CacheControl | None = None


class TextBlock(Block):
    UNSUPPORTED: ClassVar = frozenset({"citations"})

    type: Literal["text"]
    text: str


class ThinkingBlock(Block):
    """What the model thought; its signature is nobody's business here."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class ToolUseBlock(Block):
    UNSUPPORTED: ClassVar = frozenset({"caller"})

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolReference(Block):
    """A tool that a search has found; it becomes the tool's description."""

    type: Literal["tool_reference"]
    tool_name: str


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Annotated[TextBlock | ToolReference, Field(discriminator="type")]] = ""
    is_error: bool = False


Content = Annotated[
    TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]


class AnthropicMessage(Strict):
    role: Literal["user", "assistant", "system"]
    content: str | list[Content]


class AnthropicTool(Block):
    """A tool of the client's; tools that run at Anthropic are none."""

    UNSUPPORTED: ClassVar = frozenset({"allowed_callers", "input_examples"})

    type: Literal["custom"] = "custom"
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    defer_loading: bool | None = None
    # Arguments stream as they come in any case.
    eager_input_streaming: bool | None = None


class ToolChoice(Strict):
    type: Literal["auto", "any", "none", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Strict):
    """budget_tokens: the most to think with; the answer follows when they are used up."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1)
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Strict):
    type: Literal["json_schema"]
    definition: dict[str, Any] | bool = Field(alias="schema")


class OutputConfig(Strict):
    effort: Label | None = None
    format: OutputFormat | None = None


class KeepThinking(Strict):
    """Which reasoning stays in the prompt: all of it is clear_thinking false of the template."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"]


class ContextManagement(Strict):
    edits: list[KeepThinking] = Field(default_factory=list)


class Metadata(Strict):
    user_id: Label | None = None


class CountRequest(Strict):
    """POST /v1/messages/count_tokens."""

    UNSUPPORTED: ClassVar = frozenset({"container", "mcp_servers", "speed", "inference_geo"})

    model: str
    messages: list[AnthropicMessage] = Field(min_length=1)
    system: str | list[TextBlock] = ""
    tools: list[AnthropicTool] = Field(default_factory=list)
    tool_choice: ToolChoice = Field(default_factory=lambda: ToolChoice(type="auto"))
    thinking: Thinking | None = None
    output_config: OutputConfig = Field(default_factory=OutputConfig)
    context_management: ContextManagement = Field(default_factory=ContextManagement)
    cache_control: CacheControl | None = None

    @model_validator(mode="after")
    def _known_choice(self) -> "CountRequest":
        choice = self.tool_choice
        names = {tool.name for tool in self.tools}
        if choice.type in ("any", "tool") and not names:
            raise ValueError("tool_choice needs tools")
        if choice.type == "tool" and choice.name not in names:
            raise ValueError(f"tool_choice names {choice.name!r}, which is not among the tools")
        return self


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: int = Field(ge=1)
    stream: bool = False
    stop_sequences: list[str] = Field(default_factory=list, max_length=16)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    metadata: Metadata = Field(default_factory=Metadata)
    service_tier: Literal["auto", "standard_only"] = "auto"
