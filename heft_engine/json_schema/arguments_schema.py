"""JSON schemas of the arguments of functions, which are objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heft_engine.json_schema.grammar_schema import grammar_schema
from heft_engine.json_schema.keywords import COMBINERS
from heft_engine.json_schema.schema_error import SchemaError
from heft_engine.json_schema.schema_limits import SchemaSize


def arguments_schema(
    parameters: Mapping[str, Any], *, strict: bool = False, size: SchemaSize | None = None
) -> dict[str, Any]:
    """Returns `grammar_schema` of a function's arguments, which are an object where its `parameters` name no type.

    Raises SchemaError, also for parameters that allow other values than objects.
    """
    is_combined = any(name in parameters for name in COMBINERS)
    schema = parameters if is_combined else {"type": "object", **parameters}
    form = grammar_schema(schema, strict=strict, size=size)
    if not _allows_only_objects(form):
        raise SchemaError((), 'arguments are passed by name: allow objects only, with "type": "object"')
    return form


def _allows_only_objects(form: Mapping[str, Any]) -> bool:
    """Returns True if all values of a schema that `grammar_schema` has written are objects."""
    options: list[Mapping[str, Any]] = [form]
    definitions: set[str] = set()
    while options:
        option = options.pop()
        if "$ref" in option:
            name = option["$ref"].removeprefix("#/$defs/")
            if name not in definitions:
                definitions.add(name)
                options.append(form["$defs"][name])
        elif "anyOf" in option:
            options += option["anyOf"]
        elif "enum" in option:
            if not all(isinstance(value, dict) for value in option["enum"]):
                return False
        elif option.get("type") != "object":
            return False
    return True
