"""A finding about config.json together with the keys that would put it right."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fourge.doctor.findings import Finding

SHOWN_CHARACTERS = 60


class Correction(NamedTuple):
    """A finding, unless another rule tells it, and the keys with which the config would fit (None:
    take the key away).
    """

    finding: Finding | None
    keys: Mapping[str, Any]


def key_of(key: str, file: str = "config.json") -> str:
    """The place of a key, as findings name it."""
    return f"{file}: {key}"


def shown(value: object) -> str:
    """A value for a sentence, cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def list_values(values: Iterable[object]) -> str:
    """``0, 3, 4``."""
    return ", ".join(map(str, values))
