"""Checks of a whole schema, after all of its parts have been read: does every text end, do alternatives exclude
each other.

The schemas here are those that `grammar_schema` writes: `$ref`s lead to `definitions`, `enum` stands alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from heft_engine.json_schema.schema_error import Path, SchemaError

Schema = Mapping[str, Any]
_ALL_TYPES = frozenset({"string", "number", "boolean", "null", "array", "object"})


def type_of(value: Any) -> str:
    """Returns the JSON type of a value; "number" for integers, too."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    names = {str: "string", int: "number", float: "number", list: "array", dict: "object"}
    return names[type(value)]


class WholeSchema:
    """A schema with its definitions, by name."""

    def __init__(self, definitions: Mapping[str, Schema]) -> None:
        self._definitions = definitions

    def check_ends(self, root: Schema, paths: Mapping[str, Path]) -> None:
        """Raises SchemaError if some text can't come to an end: a definition that requires itself.

        `paths` are those of the definitions in the user's schema.
        """
        ending: set[str] = set()
        grows = True
        while grows:
            new = {name for name, body in self._definitions.items() if _ends(body, ending)} - ending
            ending |= new
            grows = bool(new)
        endless = [path for name, path in paths.items() if name not in ending]
        if endless or not _ends(root, ending):
            path = endless[0] if endless else ()
            raise SchemaError(
                path, "it requires itself, so that no text of it ends: allow null, or make it optional"
            )

    def check_disjoint(self, options: Sequence[Schema], path: Path) -> None:
        """Raises SchemaError unless no value can match two of the options."""
        for (first, option), (second, other) in combinations(enumerate(options), 2):
            if not self._are_disjoint(option, other, set()):
                reason = (
                    f"a value may match both option {first} and option {second}: give each a required property with "
                    "a const of its own, or use anyOf"
                )
                raise SchemaError(path, reason)

    def _are_disjoint(self, left: Schema, right: Schema, compared: set[tuple[int, int]]) -> bool:
        """`compared` pairs are not compared again: alternatives may refer to themselves."""
        left, right = self._resolved(left), self._resolved(right)
        if (id(left), id(right)) in compared:
            return True
        compared.add((id(left), id(right)))
        if "anyOf" in left:
            return all(self._are_disjoint(option, right, compared) for option in left["anyOf"])
        if "anyOf" in right:
            return all(self._are_disjoint(left, option, compared) for option in right["anyOf"])
        if not _types(left) & _types(right) or _share_no_value(left, right):
            return True
        mine, theirs = _required(left), _required(right)
        return any(
            _share_no_value(self._resolved(mine[name]), self._resolved(theirs[name]))
            for name in mine.keys() & theirs.keys()
        )

    def _resolved(self, schema: Schema) -> Schema:
        """Follows references. A circle of them matches nothing, which `check_ends` refuses."""
        for _ in range(len(self._definitions) + 1):
            if "$ref" not in schema:
                break
            schema = self._definitions[schema["$ref"].removeprefix("#/$defs/")]
        return schema


def _types(schema: Schema) -> frozenset[str]:
    if "enum" in schema:
        return frozenset(map(type_of, schema["enum"]))
    if "type" in schema:
        return frozenset({"number" if schema["type"] == "integer" else schema["type"]})
    return _ALL_TYPES


def _share_no_value(left: Schema, right: Schema) -> bool:
    """Returns True if both list their values, and none is in both."""
    if "enum" not in left or "enum" not in right:
        return False
    return not {_key(value) for value in left["enum"]} & {_key(value) for value in right["enum"]}


def _required(schema: Schema) -> dict[str, Schema]:
    """Returns the required properties of an object's schema."""
    properties = schema.get("properties", {})
    return {name: properties[name] for name in schema.get("required", ())}


def _key(value: Any) -> str:
    """Returns a text that is the same for equal values: 1 equals 1.0, and True does not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{type_of(value)} {json.dumps(value, sort_keys=True)}"


def _ends(schema: Schema, ending: set[str]) -> bool:
    """Returns True if a text of the schema ends, where those of the definitions `ending` do."""
    if "$ref" in schema:
        return schema["$ref"].removeprefix("#/$defs/") in ending
    if "anyOf" in schema:
        return any(_ends(option, ending) for option in schema["anyOf"])
    least, prefix = schema.get("minItems", 0), schema.get("prefixItems", [])
    parts = list(_required(schema).values()) + prefix[:least]
    if least > len(prefix):
        parts.append(schema["items"])
    if schema.get("minProperties", 0) > 0 and not schema.get("properties"):
        parts.append(schema.get("additionalProperties") or {})
    return all(_ends(part, ending) for part in parts)
