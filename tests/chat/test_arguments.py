"""Which kinds a schema allows, and what each makes of the text that a model wrote."""

import json

import pytest

from fourge.chat.arguments import convert, dump, read_parameters, strict_json


def kinds(schema, **root):
    parameters = {"type": "object", "properties": {"x": schema}, **root}
    return read_parameters(parameters).kinds("x")


STRING, INTEGER, NULL = {"type": "string"}, {"type": "integer"}, {"type": "null"}
SCHEMAS = [
    (STRING, {"string"}),
    ({"type": ["string", "null"]}, {"string", "null"}),
    ({"anyOf": [STRING, NULL]}, {"string", "null"}),
    ({"oneOf": [INTEGER, {"anyOf": [STRING, NULL]}]}, {"integer", "string", "null"}),
    ({"anyOf": [STRING, {}]}, None),
    ({"anyOf": [STRING, INTEGER], "type": "string"}, {"string"}),
    ({"allOf": [{"type": ["string", "null"]}, STRING]}, {"string"}),
    ({"allOf": [{"description": "?"}, {"$ref": "#/$defs/s"}]}, {"string"}),
    ({"$ref": "#/$defs/s"}, {"string"}),
    ({"$ref": "#/$defs/a~1b"}, {"integer"}),
    ({"$ref": "#/$defs/loop"}, {"string"}),
    ({"$ref": "#/$defs/itself"}, None),
    ({"$ref": "#/$defs/missing"}, None),
    ({"$ref": "https://example.org/schema"}, None),
    ({"type": "string", "nullable": True}, {"string", "null"}),
    ({"enum": ["a", "b"]}, {"string"}),
    ({"enum": ["auto", 1, None]}, {"string", "integer", "null"}),
    ({"const": True}, {"boolean"}),
    ({"properties": {}}, {"object"}),
    ({"items": STRING}, {"array"}),
    ({}, None),
    ({"description": "anything"}, None),
    (True, None),
    ({"type": 3, "anyOf": "no", "enum": {}, "$ref": 7, "allOf": [4]}, None),
]
DEFS = {
    "s": STRING,
    "a/b": INTEGER,
    "loop": {"anyOf": [STRING, {"$ref": "#/$defs/loop2"}], "type": "string"},
    "loop2": {"$ref": "#/$defs/loop"},
    "itself": {"$ref": "#/$defs/itself"},
}


@pytest.mark.parametrize(("schema", "expected"), SCHEMAS, ids=[json.dumps(s) for s, _ in SCHEMAS])
def test_kinds_of_a_schema(schema, expected):
    found = kinds(schema, **{"$defs": DEFS})
    assert found == (expected if expected is None else frozenset(expected))


def test_additional_properties_speak_for_arguments_without_a_schema():
    parameters = read_parameters({"additionalProperties": STRING, "properties": {"x": INTEGER}})
    assert parameters.kinds("y") == {"string"}
    assert parameters.kinds("x") == {"integer"}


@pytest.mark.parametrize("parameters", [None, [], "x", {"properties": [1]}, {"properties": None}])
def test_a_malformed_schema_allows_anything(parameters):
    assert read_parameters(parameters).kinds("x") is None


def test_a_schema_nested_too_deep_allows_anything():
    schema: dict = STRING
    for _ in range(20_000):
        schema = {"anyOf": [schema]}
    assert kinds(schema) is None


def test_references_that_multiply_are_read_once():
    defs = {
        f"n{level}": {"anyOf": [{"$ref": f"#/$defs/n{level + 1}"}] * 10} for level in range(200)
    }
    assert kinds({"$ref": "#/$defs/n0"}, **{"$defs": defs | {"n200": INTEGER}}) == {"integer"}


CONVERSIONS = [
    # string: never touched
    ("string", " 1 ", '" 1 "'),
    ("string", "null", '"null"'),
    ("string", '"a"', '"\\"a\\""'),
    # others: JSON, then words, then Python's containers, else a string
    ("integer", "3.5", "3.5"),
    ("integer", "1e2", "100"),
    ("integer", "-0", "0"),
    ("integer", "", '""'),
    ("integer", "0x10", '"0x10"'),
    ("integer", "9" * 5000, json.dumps("9" * 5000)),
    ("number", "3.0", "3.0"),
    ("number", "-Infinity", '"-Infinity"'),
    ("number", "1e999", '"1e999"'),
    ("boolean", "TRUE", "true"),
    ("boolean", "False\n", "false"),
    ("boolean", "yes", '"yes"'),
    ("null", "None", "null"),
    ("array", "[1, 2", '"[1, 2"'),
    ("array", "('a', None)", '["a", null]'),
    ("array", "[1, {2}]", '"[1, {2}]"'),
    ("array", "[b'x']", "\"[b'x']\""),
    ("array", "['\\d']", '["\\\\d"]'),
    ("array", "[" * 100_000, json.dumps("[" * 100_000)),
    ("array", "(" * 5_000, json.dumps("(" * 5_000)),
    ("array", "['a'] * 3", "\"['a'] * 3\""),
    ("object", "{'a': True}", '{"a": true}'),
    ("object", "{1: 2}", '{"1": 2}'),
    ("object", "{(1, 2): 3}", '"{(1, 2): 3}"'),
    ("object", '{"a": "\\ud800"}', '{"a": "\\ud800"}'),
    ("object", '{"a": NaN}', '"{\\"a\\": NaN}"'),
    ("object", '"text"', '"text"'),
    # string or others: JSON of an admitted kind; a string keeps its quotes
    ("string null", "null", "null"),
    ("string null", "None", '"None"'),
    ("string null", "7", '"7"'),
    ("string null", '"x"', '"\\"x\\""'),
    ("string integer", "7.0", "7"),
    ("string integer", "7.5", '"7.5"'),
    ("string number", " 7 ", "7"),
    ("string number", "true", '"true"'),
    ("string array", "[1]", "[1]"),
    ("string array", "['a']", "\"['a']\""),
    # any: JSON where nothing is lost
    (None, "12", "12"),
    (None, " 12 ", "12"),
    (None, "012", '"012"'),
    (None, "1.50", '"1.50"'),
    (None, "1e3", '"1e3"'),
    (None, "true", "true"),
    (None, "True", '"True"'),
    (None, '"x"', '"\\"x\\""'),
    (None, "hello", '"hello"'),
    (None, '{"a" : [1, "b  c"]}', '{"a": [1, "b  c"]}'),
    (None, '{"a":"\\u00e9"}', '{"a": "\u00e9"}'),
    (None, '{"a":"\u00e9"}', '{"a": "\u00e9"}'),
    (None, '{"a":1,"a":2}', '"{\\"a\\":1,\\"a\\":2}"'),
    (None, "NaN", '"NaN"'),
    (None, "", '""'),
]


@pytest.mark.parametrize(
    ("allowed", "text", "expected"),
    CONVERSIONS,
    ids=[f"{allowed}-{text[:20]!r}" for allowed, text, _ in CONVERSIONS],
)
def test_conversion(allowed, text, expected):
    converted = convert(text, None if allowed is None else frozenset(allowed.split()))
    assert converted == expected
    strict_json(converted)
    converted.encode("utf-8")


def test_strings_keep_their_letters_but_for_halves_of_one():
    assert dump("\u00e9\u2028") == '"\u00e9\u2028"'
    assert dump("\u00e9\ud83d") == '"\\u00e9\\ud83d"'


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}'])
def test_strict_json_refuses_what_is_none(text):
    with pytest.raises(ValueError, match="is no JSON"):
        strict_json(text)


UNITS = {"enum": ["celsius", " kelvin", ""]}


@pytest.mark.parametrize(
    ("schema", "strings"),
    [
        (UNITS, {"celsius", " kelvin", ""}),
        ({"type": "string", "const": "a"}, {"a"}),
        ({"$ref": "#/$defs/unit"}, {"celsius", " kelvin", ""}),
        ({"anyOf": [{"$ref": "#/$defs/unit"}, NULL]}, {"celsius", " kelvin", ""}),
        ({"anyOf": [{"enum": ["a"]}, {"const": "b"}, INTEGER]}, {"a", "b"}),
        ({"allOf": [STRING, {"enum": ["a", "b"]}, {"enum": ["b", 1]}]}, {"b"}),
        ({"anyOf": [UNITS, STRING]}, set()),
        ({"anyOf": [UNITS, {}]}, set()),
        ({"enum": [1, 2]}, set()),
        (STRING, set()),
        ({"$ref": "#/$defs/itself"}, set()),
        ({"anyOf": [{"$ref": "#/$defs/twice"}] * 2}, {"a"}),
        ({"enum": "no", "$ref": 7}, set()),
        (True, set()),
    ],
)
def test_enumerated_strings_of_a_schema(schema, strings):
    definitions = {"unit": UNITS, "itself": {"$ref": "#/$defs/itself"}, "twice0": {"enum": ["a"]}}
    for number in range(64):  # read once each, or this would not end
        definitions[f"twice{number + 1}"] = {"oneOf": [{"$ref": f"#/$defs/twice{number}"}] * 2}
    definitions["twice"] = definitions["twice64"]
    parameters = {"properties": {"x": schema}, "$defs": definitions}
    assert read_parameters(parameters).strings("x") == strings


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (" celsius\n", "celsius"),
        ("celsius", "celsius"),
        (" kelvin", " kelvin"),
        ("kelvin ", "kelvin "),  # not one of them, however it is stripped
        ("  ", ""),
        (" furlong ", " furlong "),
        ("Celsius ", "Celsius "),
    ],
)
@pytest.mark.parametrize("schema", [UNITS, {"anyOf": [UNITS, NULL]}])
def test_white_space_around_an_enumerated_string_is_none_of_it(schema, text, value):
    parameters = read_parameters({"properties": {"x": schema}})
    found = convert(text, parameters.kinds("x"), parameters.strings("x"))
    assert json.loads(found) == value
