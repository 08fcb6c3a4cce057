"""An argument as the model wrote it -> JSON, by the tool's own schema.

The model writes strings raw and everything else as JSON, so the schema decides which of the two a
text is. What is no JSON becomes a string rather than an error. Output is always strict JSON that
UTF-8 can hold.
"""

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

# JSON schema types that a value may have; None = any.
Kinds = frozenset[str] | None
STRING = frozenset({"string"})

_WORDS = {"true": True, "false": False, "null": None, "none": None}
_STRING_OR_SPACE = re.compile(r'("(?:[^"\\]|\\.)*")|\s+')
# Half of a character: JSON can name it, UTF-8 and tokenizers cannot hold it.
SURROGATE = re.compile("[\ud800-\udfff]")
# What json and ast raise on text that they cannot read, or values that JSON cannot hold.
_UNREADABLE = (ValueError, TypeError, SyntaxError, KeyError, RecursionError, MemoryError)


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a tool's schema says of its arguments: kinds by name, and of those it does not name."""

    named: dict[str, Kinds]
    others: Kinds = None

    def kinds(self, key: str) -> Kinds:
        """The kinds that the argument may have."""
        return self.named.get(key, self.others)


def read_parameters(parameters: object) -> Parameters:
    """The schema of a tool's parameters; what is malformed in it, or nested too deep, allows any
    kind."""
    root = parameters if isinstance(parameters, Mapping) else {}
    properties = root.get("properties")
    memo: dict[str, Kinds] = {}
    if not isinstance(properties, Mapping):
        properties = {}
    try:
        kinds = {key: _kinds(schema, root, memo) for key, schema in properties.items()}
        others = _kinds(root.get("additionalProperties"), root, memo)
    except RecursionError:
        return Parameters(dict.fromkeys(properties), None)
    return Parameters(kinds, others)


def dump(value: object) -> str:
    """Strict JSON; ValueError or TypeError if JSON cannot hold the value."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return json.dumps(value) if SURROGATE.search(text) else text


def strict_json(text: str) -> Any:
    """The value of a JSON text; ValueError also for NaN and Infinity, which Python would take."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def convert(text: str, kinds: Kinds) -> str:
    """The JSON of an argument that the model wrote as ``text``.

    string: as it is. Other kinds: JSON, else true/false/null/none in any case, else a Python
    container. string or others: JSON if its kind is admitted. Any: JSON if nothing is lost by it.
    Everything else is a string.
    """
    try:
        if kinds is None:
            return _convert_lossless(text)
        if kinds == STRING:
            return dump(text)
        readings = (strict_json,) if "string" in kinds else (strict_json, _word, _container)
        return _convert_first(text, kinds, readings)
    except _UNREADABLE:
        return dump(text)


def _convert_first(
    text: str, kinds: frozenset[str], readings: Iterable[Callable[[str], Any]]
) -> str:
    for reading in readings:
        try:
            value = reading(text.strip())
            if isinstance(value, float) and "integer" in kinds and "number" not in kinds:
                value = int(value) if value.is_integer() else value
            if "string" in kinds and not _admitted(value, kinds):
                break
            return dump(value)
        except _UNREADABLE:
            continue
    return dump(text)


def _convert_lossless(text: str) -> str:
    value = strict_json(text)
    compact = _STRING_OR_SPACE.sub(r"\1", text)
    forms = (
        json.dumps(value, ensure_ascii=escaped, separators=(",", ":")) for escaped in (False, True)
    )
    return dump(text if isinstance(value, str) or compact not in forms else value)


def _admitted(value: object, kinds: frozenset[str]) -> bool:
    """Not strings: one in quotes was meant with its quotes, since the model writes strings raw."""
    kind = _kind_of(value)
    return kind != "string" and (kind in kinds or (kind == "integer" and "number" in kinds))


def _word(text: str) -> bool | None:
    return _WORDS[text.lower()]


def _container(text: str) -> list | tuple | dict:
    if not text.startswith(("[", "{", "(")):
        raise ValueError("no container")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes, in what is not our code
        value = ast.literal_eval(text)
    if not isinstance(value, list | tuple | dict):
        raise ValueError("no container")
    return value


def _kind_of(value: object) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
    return names.get(type(value), "object" if isinstance(value, Mapping) else "array")


def _kinds(schema: object, root: Mapping[str, Any], memo: dict[str, Kinds]) -> Kinds:
    """What all constraints of a schema agree on; ``memo`` has the references seen so far."""
    if not isinstance(schema, Mapping):
        return None
    constraints = [_own_kinds(schema), _referred(schema.get("$ref"), root, memo)]
    for key in ("anyOf", "oneOf"):
        branches = [_kinds(branch, root, memo) for branch in _list(schema.get(key))]
        if branches and None not in branches:
            constraints.append(frozenset[str]().union(*(kinds for kinds in branches if kinds)))
    constraints += [_kinds(part, root, memo) for part in _list(schema.get("allOf"))]
    result: Kinds = None
    for kinds in constraints:
        if kinds is not None:
            result = kinds if result is None else result & kinds or kinds
    return result | {"null"} if result and schema.get("nullable") is True else result


def _own_kinds(schema: Mapping[str, Any]) -> Kinds:
    declared = schema.get("type")
    if isinstance(declared, str):
        return frozenset({declared})
    if isinstance(declared, list):
        return frozenset(kind for kind in declared if isinstance(kind, str)) or None
    if "const" in schema:
        return frozenset({_kind_of(schema["const"])})
    if _list(schema.get("enum")):
        return frozenset(map(_kind_of, schema["enum"]))
    if "properties" in schema:
        return frozenset({"object"})
    return frozenset({"array"}) if "items" in schema else None


def _referred(ref: object, root: Mapping[str, Any], memo: dict[str, Kinds]) -> Kinds:
    """A reference within the schema (#/$defs/Name); any other allows anything, as does a cycle."""
    if not isinstance(ref, str) or not ref.startswith("#"):
        return None
    if ref not in memo:
        memo[ref] = None
        target: object = root
        for part in ref[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            target = target.get(name) if isinstance(target, Mapping) else None
        memo[ref] = _kinds(target, root, memo)
    return memo[ref]


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
