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
from dataclasses import dataclass, field
from typing import Any, NoReturn

# JSON schema types that a value may have; None = any.
Kinds = frozenset[str] | None
# Strings that a value is one of, if it is a string; None = any.
Strings = frozenset[str] | None
STRING = frozenset({"string"})

_WORDS = {"true": True, "false": False, "null": None, "none": None}
_STRING_OR_SPACE = re.compile(r'("(?:[^"\\]|\\.)*")|\s+')
# Half of a character: JSON can name it, UTF-8 and tokenizers cannot hold it.
SURROGATE = re.compile("[\ud800-\udfff]")
# What json and ast raise on text that they cannot read, or values that JSON cannot hold.
_UNREADABLE = (ValueError, TypeError, SyntaxError, KeyError, RecursionError, MemoryError)


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a tool's schema says of its arguments: kinds by name, and of those it does not name;
    and the strings that may stand where no other may.
    """

    named: dict[str, Kinds]
    others: Kinds = None
    enumerated: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def kinds(self, key: str) -> Kinds:
        """The kinds that the argument may have."""
        return self.named.get(key, self.others)

    def strings(self, key: str) -> frozenset[str]:
        """The strings that the argument is one of; empty if it may be any."""
        return self.enumerated.get(key, frozenset())


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
        seen: dict[str, Strings] = {}
        found = {key: _strings(schema, root, seen) for key, schema in properties.items()}
    except RecursionError:
        return Parameters(dict.fromkeys(properties), None)
    return Parameters(kinds, others, {key: strings for key, strings in found.items() if strings})


def dump(value: object) -> str:
    """Strict JSON; ValueError or TypeError if JSON cannot hold the value."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return json.dumps(value) if SURROGATE.search(text) else text


def strict_json(text: str) -> Any:
    """The value of a JSON text; ValueError also for NaN and Infinity, which Python would take."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def convert(text: str, kinds: Kinds, strings: frozenset[str] = frozenset()) -> str:
    """The JSON of an argument that the model wrote as ``text``.

    string: as it is, but without the white space around one of ``strings`` (xgrammar's grammars
    let it come). Other kinds: JSON, else true/false/null/none in any case, else a Python
    container. string or others: JSON if its kind is admitted. Any: JSON if nothing is lost by it.
    Everything else is a string.
    """
    if text not in strings and text.strip() in strings:
        text = text.strip()
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
    """Of what a reference points to; a cycle allows anything."""
    if not isinstance(ref, str):
        return None
    if ref not in memo:
        memo[ref] = None
        memo[ref] = _kinds(_target(ref, root), root, memo)
    return memo[ref]


def _strings(schema: object, root: Mapping[str, Any], memo: dict[str, Strings]) -> Strings:
    """The strings that a schema enumerates; ``memo`` as of _kinds."""
    if not isinstance(schema, Mapping):
        return None
    kinds = _own_kinds(schema)
    if kinds is not None and "string" not in kinds:
        return frozenset()
    own = [schema["const"]] if "const" in schema else _list(schema.get("enum"))
    found: list[Strings] = [frozenset(one for one in own if isinstance(one, str))] if own else []
    ref = schema.get("$ref")
    if isinstance(ref, str):
        if ref not in memo:
            memo[ref] = None
            memo[ref] = _strings(_target(ref, root), root, memo)
        found.append(memo[ref])
    found += [_strings(part, root, memo) for part in _list(schema.get("allOf"))]
    for key in ("anyOf", "oneOf"):
        branches = [_strings(branch, root, memo) for branch in _list(schema.get(key))]
        if branches and None not in branches:
            found.append(frozenset[str]().union(*(strings for strings in branches if strings)))
    bounds = [strings for strings in found if strings is not None]
    return frozenset.intersection(*bounds) if bounds else None


def _target(ref: object, root: Mapping[str, Any]) -> object:
    """What a reference within the schema (#/$defs/Name) points to; None: nothing, or elsewhere."""
    if not isinstance(ref, str) or not ref.startswith("#"):
        return None
    target: object = root
    for part in ref[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        target = target.get(name) if isinstance(target, Mapping) else None
    return target


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
