"""Reading JSON records that others may have written or changed: checked values, or one sentence."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fourge.errors import CheckpointError

T = TypeVar("T")


def read_as(path: Path, parse: Callable[[Mapping[str, Any]], T], remedy: str) -> T | None:
    """``parse`` of the JSON object in ``path``; None where there is no such file.

    Raises CheckpointError, with the remedy, if the file is not what fourge writes there.
    """
    if not path.exists():
        return None
    try:
        return parse(as_mapping(json.loads(path.read_bytes())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{path} is not the record that fourge writes there ({what}): {remedy}, or remove it."
        ) from None


def as_mapping(value: object) -> Mapping[str, Any]:
    """The value if it is a JSON object."""
    if not isinstance(value, Mapping):
        raise TypeError(f"a {type(value).__name__} where an object is needed")
    return value


def as_list(value: object) -> list[Any]:
    """The value if it is a JSON array."""
    if not isinstance(value, list):
        raise TypeError(f"a {type(value).__name__} where an array is needed")
    return value


def number(value: object) -> float:
    """The value if it is a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r:.40} where a number is needed")
    return float(value)


def maybe(value: object) -> float | None:
    """The same, or None for null."""
    return None if value is None else number(value)


def count(value: object) -> int:
    """The value if it is a whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r:.40} where a whole number is needed")
    return value


def counts(values: object) -> tuple[int, ...]:
    return tuple(count(value) for value in as_list(values))


def numbers(values: object) -> tuple[float, ...]:
    return tuple(number(value) for value in as_list(values))


def texts(values: Iterable[object]) -> tuple[str, ...]:
    return tuple(str(value) for value in values)
