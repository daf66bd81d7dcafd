"""Checks of a whole schema, after all of its parts have been read: does every text end, do alternatives exclude
each other, are there few enough of them.

The schemas here are those that `grammar_schema` writes: `$ref`s lead to `definitions`, `enum` stands alone. The work is
linear in the schema, or counted by its SchemaSize.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, count, product
from typing import Any

from heft_engine.json_schema.schema_error import Path, SchemaError
from heft_engine.json_schema.schema_limits import ANY_CHOICES, SchemaSize

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


@dataclass(frozen=True, kw_only=True)
class _Traits:
    """A schema's types, and the values that it lists: under "" its own, under "/name" those of a required property."""

    types: frozenset[str]
    values: Mapping[str, frozenset[str]]


class WholeSchema:
    """A schema with its definitions, by name. `paths` are those of the definitions in the user's schema."""

    def __init__(
        self, root: Schema, definitions: Mapping[str, Schema], paths: Mapping[str, Path], size: SchemaSize
    ) -> None:
        self._root = root
        self._definitions = definitions
        self._paths = paths
        self._size = size
        # By the id of a schema or an enum, which live as long as this.
        self._traits: dict[int, _Traits] = {}
        self._keys: dict[int, frozenset[str]] = {}
        self._texts: dict[int, str] = {}

    def check_ends(self) -> None:
        """Raises SchemaError if some text can't come to an end: a definition that requires itself."""
        ending = _ending_definitions({**self._definitions, "": self._root})
        endless = [path for name, path in self._paths.items() if name not in ending]
        if endless or "" not in ending:
            path = endless[0] if endless else ()
            raise SchemaError(
                path, "it requires itself, so that no text of it ends: allow null, or make it optional"
            )

    def check_choices(self) -> None:
        """Counts the alternatives of every value. Raises SchemaError for too many of them."""
        bodies = [(self._root, ()), *((body, self._paths[name]) for name, body in self._definitions.items())]
        alike: set[frozenset[str]] = set()
        for body, path in bodies:
            for value in _values_within(body):
                options = self._options(value, path)
                self._size.add_choices(ANY_CHOICES * sum(not part for part in options), path)
                texts = frozenset(self._text(part) for part in options if _begins_like_others(part))
                if texts not in alike:
                    alike.add(texts)
                    self._size.add_like_options(max(0, len(texts) - 1), path)

    def check_disjoint(self, options: Sequence[Schema], path: Path) -> None:
        """Raises SchemaError unless no value can match two of the options."""
        alternatives = [self._options(option, path) for option in options]
        for (first, left), (second, right) in combinations(enumerate(alternatives), 2):
            if not all(self._are_disjoint(*pair, path) for pair in product(left, right)):
                reason = (
                    f"a value may match both option {first} and option {second}: give each a required property with "
                    "a const of its own, or use anyOf"
                )
                raise SchemaError(path, reason)

    def _options(self, schema: Schema, path: Path) -> list[Schema]:
        """Returns the alternatives of a schema, without `anyOf` and `$ref`, each once.

        A circle of references has none, which `check_ends` refuses.
        """
        options: dict[int, Schema] = {}
        pending, entered = [schema], set()
        while pending:
            self._size.add_choices(1, path)
            part = pending.pop()
            if "anyOf" in part:
                pending += part["anyOf"]
            elif "$ref" not in part:
                options[id(part)] = part
            elif part["$ref"] not in entered:
                entered.add(part["$ref"])
                pending.append(self._definition(part))
        return list(options.values())

    def _are_disjoint(self, left: Schema, right: Schema, path: Path) -> bool:
        mine, theirs = self._traits_of(left), self._traits_of(right)
        self._size.add_comparisons(1 + min(len(mine.values), len(theirs.values)), path)
        if not mine.types & theirs.types:
            return True
        listed = mine.values.keys() & theirs.values.keys()
        return any(mine.values[name].isdisjoint(theirs.values[name]) for name in listed)

    def _traits_of(self, schema: Schema) -> _Traits:
        if id(schema) not in self._traits:
            parts = {f"/{name}": self._resolved(part) for name, part in _required(schema).items()}
            parts[""] = schema
            values = {name: self._keys_of(part["enum"]) for name, part in parts.items() if "enum" in part}
            self._traits[id(schema)] = _Traits(types=_types(schema), values=values)
        return self._traits[id(schema)]

    def _keys_of(self, values: Sequence[Any]) -> frozenset[str]:
        if id(values) not in self._keys:
            self._keys[id(values)] = frozenset(map(_key, values))
        return self._keys[id(values)]

    def _text(self, schema: Schema) -> str:
        if id(schema) not in self._texts:
            self._texts[id(schema)] = json.dumps(schema)
        return self._texts[id(schema)]

    def _resolved(self, schema: Schema) -> Schema:
        """Follows references, if they lead anywhere."""
        for _ in range(len(self._definitions) + 1):
            if "$ref" not in schema:
                break
            schema = self._definition(schema)
        return schema

    def _definition(self, reference: Schema) -> Schema:
        return self._definitions[_name(reference)]


def _name(reference: Schema) -> str:
    name: str = reference["$ref"].removeprefix("#/$defs/")
    return name


def _values_within(schema: Schema) -> Iterator[Schema]:
    """Yields the schema and those of all values within it: of properties and items."""
    pending = [schema]
    while pending:
        value = pending.pop()
        yield value
        options = [value]
        while options:
            option = options.pop()
            options += option.get("anyOf", [])
            parts = [*option.get("properties", {}).values(), *option.get("prefixItems", [])]
            others = (option.get("items"), option.get("additionalProperties"))
            pending += [*parts, *(part for part in others if isinstance(part, dict))]


def _begins_like_others(option: Schema) -> bool:
    """Returns True for an array and for an object of any names, which may be like another one for long."""
    return option.get("type") == "array" or (option.get("type") == "object" and not option.get("properties"))


def _types(schema: Schema) -> frozenset[str]:
    if "enum" in schema:
        return frozenset(map(type_of, schema["enum"]))
    if "type" in schema:
        return frozenset({"number" if schema["type"] == "integer" else schema["type"]})
    return _ALL_TYPES


def _required(schema: Schema) -> dict[str, Schema]:
    """Returns the required properties of an object's schema."""
    properties = schema.get("properties", {})
    return {name: properties[name] for name in schema.get("required", ())}


def _key(value: Any) -> str:
    """Returns a text that is the same for equal values: 1 equals 1.0, and True does not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{type_of(value)} {json.dumps(value, sort_keys=True)}"


def _ending_definitions(definitions: Mapping[str, Schema]) -> set[str]:
    """Returns the definitions that have a text which ends: those whose parts do, from the innermost ones outwards."""
    numbers = count()
    missing: dict[str | int, int] = dict.fromkeys(definitions, 1)
    dependents: defaultdict[str | int, list[str | int]] = defaultdict(list)

    def add(schema: Schema, dependent: str | int) -> None:
        if "$ref" in schema:
            dependents[_name(schema)].append(dependent)
            return
        number = next(numbers)
        dependents[number].append(dependent)
        parts = schema.get("anyOf") or _unavoidable(schema)
        missing[number] = 1 if "anyOf" in schema else len(parts)
        for part in parts:
            add(part, number)

    for name, body in definitions.items():
        add(body, name)
    ending = [part for part, parts in missing.items() if parts == 0]
    for part in ending:
        for dependent in dependents[part]:
            missing[dependent] -= 1
            if missing[dependent] == 0:
                ending.append(dependent)
    return {name for name in ending if isinstance(name, str)}


def _unavoidable(schema: Schema) -> list[Schema]:
    """Returns the parts that every value of the schema has."""
    least, prefix = schema.get("minItems", 0), schema.get("prefixItems", [])
    parts = [*_required(schema).values(), *prefix[:least]]
    if least > len(prefix):
        parts.append(schema["items"])
    if schema.get("minProperties", 0) > 0 and not schema.get("properties"):
        parts.append(schema.get("additionalProperties") or {})
    return parts
