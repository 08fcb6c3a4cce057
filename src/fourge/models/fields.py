"""Typed values out of a config.json, and the one form of its errors. Imports no torch.

``raw`` is the parsed file; a null counts as absent. Every reader raises ConfigError when the value
is absent without a default, or not what is asked for.
"""

import math
from collections.abc import Mapping
from typing import Any

from fourge.errors import ConfigError

_SHOWN_CHARACTERS = 120


def refused(key: str, found: object, needed: str) -> ConfigError:
    """The error for a value that this house cannot compute with."""
    shown = repr(found)
    if len(shown) > _SHOWN_CHARACTERS:
        shown = shown[:_SHOWN_CHARACTERS] + "..."
    return ConfigError(
        f"config.json has {key} = {shown}; needed is {needed}: correct config.json if it does not"
        " describe these weights, otherwise fourge cannot compute this model."
    )


def integer(
    raw: Mapping[str, Any], key: str, *, minimum: int = 1, default: int | None = None
) -> int:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise refused(key, value, f"an integer of at least {minimum}")
    return value


def number(raw: Mapping[str, Any], key: str, *, default: float | None = None) -> float:
    """A finite number above zero; zero too when the default is zero."""
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value < 0
        or (value == 0 and default != 0)
    ):
        raise refused(key, value, "a positive number")
    return float(value)


def boolean(raw: Mapping[str, Any], key: str, *, default: bool | None = None) -> bool:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, bool):
        raise refused(key, value, "true or false")
    return value


def strings(raw: Mapping[str, Any], key: str) -> list[str] | None:
    """A list of strings, or None if the key is absent or null."""
    value = raw.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise refused(key, value, "a list of strings")
    return value
