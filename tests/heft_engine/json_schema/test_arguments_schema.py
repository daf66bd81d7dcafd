"""JSON schemas of functions' arguments."""

from __future__ import annotations

from typing import Any

import pytest

from heft_engine.json_schema.arguments_schema import arguments_schema
from heft_engine.json_schema.grammar_schema import grammar_schema
from heft_engine.json_schema.schema_error import SchemaError

STRING = {"type": "string"}
OBJECT = {"type": "object", "properties": {"a": STRING}, "required": ["a"]}


def test_arguments_are_an_object() -> None:
    assert arguments_schema({}) == grammar_schema({"type": "object"})
    assert arguments_schema({"properties": {}}) == grammar_schema({"type": "object", "properties": {}})
    both = {"anyOf": [{"$ref": "#/$defs/o"}, {"enum": [{"a": 1}]}, {"$ref": "#"}], "$defs": {"o": OBJECT}}
    for schema in (both, {"const": {"a": 1}}, {"allOf": [OBJECT]}):
        assert arguments_schema(schema) == grammar_schema(schema)


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": ["object", "null"]},
        {"anyOf": [STRING]},
        {"oneOf": [OBJECT, {"type": "null"}]},
        {"allOf": [{}]},
        {"enum": [{}, 1]},
        {"const": "x"},
        {"$ref": "#/$defs/n", "$defs": {"n": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "integer"}]}}},
    ],
)
def test_arguments_of_another_type_are_refused(parameters: dict[str, Any]) -> None:
    grammar_schema(parameters)
    with pytest.raises(SchemaError, match="objects only") as refusal:
        arguments_schema(parameters)
    assert refusal.value.path == ()
