"""The keywords of JSON Schema that a grammar holds, and advice for those that it does not hold."""

from __future__ import annotations

from collections.abc import Mapping

#: Keywords that change no value.
ANNOTATIONS = frozenset(
    {"title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly"}
    | {"$comment", "$schema", "$id", "$defs", "definitions", "discriminator"}
)
_NUMERIC = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
#: Keywords of each type.
KEYWORDS: Mapping[str, frozenset[str]] = {
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "number": _NUMERIC,
    "integer": _NUMERIC,
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems", "uniqueItems"}),
    "object": frozenset({"properties", "required", "additionalProperties", "minProperties", "maxProperties"}),
    "boolean": frozenset(),
    "null": frozenset(),
}
TYPED = ANNOTATIONS.union(*KEYWORDS.values(), {"type"})
#: Keywords that stand alone in a schema.
COMBINERS = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
_CASES = "use anyOf with an object for each case"
#: For keywords that are not supported, what to do instead.
ADVICE = {
    "not": "list what is allowed instead",
    "if": _CASES,
    "then": _CASES,
    "else": _CASES,
    "dependencies": _CASES,
    "dependentRequired": _CASES,
    "dependentSchemas": _CASES,
    "patternProperties": "use additionalProperties without properties",
    "propertyNames": "use additionalProperties without properties",
    "contains": "describe every item in items or prefixItems",
    "minContains": "use minItems",
    "maxContains": "use maxItems",
    "unevaluatedProperties": "use additionalProperties",
    "unevaluatedItems": "use items",
    "additionalItems": "use prefixItems with items",
    "nullable": 'use anyOf with {"type": "null"}',
}
