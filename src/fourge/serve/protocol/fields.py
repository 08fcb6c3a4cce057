"""What the requests of several surfaces have in common."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

# Sent by clients, of no use to a server that keeps nothing: shown in the log.
Label = Annotated[str, Field(max_length=512)]

MOST_CHOICES = 128
LARGE = 2**31 - 1
_SEED = 2**62  # with room for the seeds of further answers


class Strict(BaseModel):
    """A request or a part of one. ``UNSUPPORTED``: fields of the original API that are refused."""

    model_config = ConfigDict(extra="forbid")
    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """Null is absent, whatever the name: clients send answers back with all fields that their
        version knows."""
        if not isinstance(given, Mapping):
            return given
        kept = {name: value for name, value in given.items() if value is not None}
        for name in kept:
            if name in cls.UNSUPPORTED:
                raise PydanticCustomError(
                    "unsupported", "{name} is not supported: leave it out", {"name": name}
                )
        return kept


class StreamOptions(Strict):
    """include_usage: a last chunk with usage; continuous_usage_stats: usage in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False


class JsonSchema(Strict):
    name: str = ""
    description: str = ""
    # "schema" would hide a method of pydantic's models.
    definition: dict[str, Any] | bool = Field(default_factory=dict, alias="schema")
    strict: bool = True


class PlainText(Strict):
    type: Literal["text"]


class JsonObject(Strict):
    type: Literal["json_object"]


class JsonBySchema(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class ByTag(Strict):
    """A structural tag of xgrammar's, for the whole of the output."""

    type: Literal["structural_tag"]
    format: dict[str, Any]


ResponseFormat = Annotated[
    PlainText | JsonObject | JsonBySchema | ByTag, Field(discriminator="type")
]


class SamplingFields(Strict):
    """How tokens are chosen; the names are those of engine/params.py."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, ge=-1, le=LARGE)
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] = Field(default_factory=dict)
    allowed_token_ids: list[int] | None = Field(None, min_length=1)
    min_tokens: int = Field(0, ge=0, le=LARGE)
    stop_token_ids: list[int] = Field(default_factory=list, max_length=64)
    ignore_eos: bool = False
    seed: int | None = Field(None, ge=-_SEED, le=_SEED)
    cache_salt: str = ""

    def sampling(self) -> dict[str, Any]:
        """What was given, as arguments of SamplingParams."""
        names = SamplingFields.model_fields.keys() & self.model_fields_set
        return {name: getattr(self, name) for name in names}


class StopFields(SamplingFields):
    """Strings that end the text, of which OpenAI allows 4, and those that may not come."""

    stop: str | Annotated[list[str], Field(max_length=16)] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    bad_words: list[Annotated[str, Field(pattern=r"\S")]] = Field(
        default_factory=list, max_length=1024, description="What the output may not have in it."
    )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Those that are not empty."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop
        return tuple(text for text in given if text)


def known_fields() -> list[str]:
    """Names of all fields of all requests, for hints."""
    found: set[str] = set()
    models: list[type[Strict]] = [Strict]
    while models:
        model = models.pop()
        found |= model.model_fields.keys()
        models += model.__subclasses__()
    return sorted(found)
