"""Limits of a schema's size: OpenAI's, and those that keep its check, its grammar and its texts quick.

A request's schemas become one grammar, those of all tools and of the answer: they are counted together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from heft_engine.json_schema.schema_error import Path, SchemaError
from heft_engine.json_schema.string_patterns import MAX_SIZE

#: OpenAI's: levels of objects and arrays, characters of names and of listed values, listed values, and characters of an
#: enum with more than 250 texts.
MAX_DEPTH = 10
MAX_CHARACTERS = 120_000
MAX_ENUM_VALUES = 1_000
MAX_LONG_ENUM_CHARACTERS = 15_000
_LONG_ENUM = 250
#: Our own: properties in all, where OpenAI allows 5,000: 2,000 texts in one object take four seconds to compile, 3,000
#: take twelve.
MAX_PROPERTIES = 2_000
#: Characters as JSON and schemas within the schema, parts that references lead to, characters of patterns.
MAX_JSON_CHARACTERS = 250_000
MAX_PARTS = 10_000
MAX_DEFINITIONS = 500
MAX_PATTERN_CHARACTERS = 10_000
#: Alternatives, those that must exclude each other, and comparisons to see that they do. Steps from the schema to a
#: part.
MAX_OPTIONS = 500
MAX_EXCLUSIVE_OPTIONS = 100
MAX_COMPARISONS = 20_000
MAX_STEPS = 100
#: The sum of the squares of objects' numbers of optional properties: any may follow any other one before it, and a
#: thousand in one object take a minute to compile. With minProperties or maxProperties, which count them: properties of
#: one object.
MAX_OPTIONAL_PAIRS = 100_000
MAX_COUNTED_PROPERTIES = 20
#: Alternatives of all values, counted at each value: a grammar with 64 kinds of objects, each of which has two values
#: of all kinds, takes one to two seconds to compile.
MAX_CHOICES = 20_000
#: Counted for a value that may be anything: 1,000 objects of any values take twelve seconds.
ANY_CHOICES = 60
#: Alternatives that begin like another one, arrays and objects of any names, wherever they differ: with 64 arrays of
#: one another the mask of each token after `[[[` takes 50 ms, with 16 two.
MAX_LIKE_OPTIONS = 16


class SchemaSize:
    """Counts a schema's parts. Raises SchemaError, with the part's path, for one too many."""

    def __init__(self) -> None:
        self._json_characters = self._parts = 0
        self._properties = self._characters = self._enum_values = self._optional_pairs = 0
        self._pattern_size = self._pattern_characters = 0
        self._choices = self._like_options = self._comparisons = 0

    def add_schema(self, schema: Any) -> None:
        """Counts the characters of a schema, before anything else looks at it."""
        try:
            self._json_characters += len(json.dumps(schema))
        except RecursionError:
            raise SchemaError((), "it is nested too deep") from None
        if self._json_characters > MAX_JSON_CHARACTERS:
            raise SchemaError((), f"schemas may have up to {MAX_JSON_CHARACTERS:,} characters as JSON in all")

    def add_part(self, path: Path) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise SchemaError(path, f"schemas may have up to {MAX_PARTS:,} schemas within them in all")

    def add_choices(self, number: int, path: Path) -> None:
        self._choices += number
        if self._choices > MAX_CHOICES:
            reason = f"the alternatives of all values, by anyOf, oneOf and references, may be up to {MAX_CHOICES:,}"
            raise SchemaError(path, reason)

    def add_like_options(self, number: int, path: Path) -> None:
        self._like_options += number
        if self._like_options > MAX_LIKE_OPTIONS:
            reason = (
                f"anyOf may have up to {MAX_LIKE_OPTIONS} arrays, or objects without properties, beside another one: "
                "use one array with anyOf in its items"
            )
            raise SchemaError(path, reason)

    def add_comparisons(self, number: int, path: Path) -> None:
        self._comparisons += number
        if self._comparisons > MAX_COMPARISONS:
            raise SchemaError(path, "it has too many options to see that they exclude each other: use anyOf")

    def add_properties(self, names: Sequence[str], path: Path) -> None:
        self._properties += len(names)
        self._add_characters(sum(map(len, names)), path)
        if self._properties > MAX_PROPERTIES:
            raise SchemaError(path, f"a schema may have up to {MAX_PROPERTIES:,} properties in all")

    def add_object(self, properties: int, optional: int, path: Path, *, are_counted: bool) -> None:
        """Counts an object's optional properties. `are_counted`: minProperties or maxProperties limit them."""
        self._optional_pairs += optional**2
        if self._optional_pairs > MAX_OPTIONAL_PAIRS:
            reason = (
                "it has too many optional properties, 300 in one object: require them, and allow null instead"
            )
            raise SchemaError((*path, "required"), reason)
        if are_counted and properties > MAX_COUNTED_PROPERTIES:
            reason = (
                f"minProperties and maxProperties need objects of up to {MAX_COUNTED_PROPERTIES} properties"
            )
            raise SchemaError(path, reason)

    def add_values(self, values: Sequence[Any], path: Path) -> None:
        """Counts the values of an `enum` or a `const`."""
        texts = [value for value in values if isinstance(value, str)]
        characters = sum(map(len, texts))
        self._add_characters(characters, path)
        self._enum_values += len(values)
        if self._enum_values > MAX_ENUM_VALUES:
            raise SchemaError(path, f"a schema may list up to {MAX_ENUM_VALUES:,} values in all")
        if len(texts) > _LONG_ENUM and characters > MAX_LONG_ENUM_CHARACTERS:
            reason = (
                f"an enum of more than {_LONG_ENUM} texts may have {MAX_LONG_ENUM_CHARACTERS:,} characters"
            )
            raise SchemaError(path, reason)

    def add_pattern(self, size: int, characters: int, path: Path) -> None:
        """Counts a pattern's size with its repetitions written out, and its characters as they came."""
        self._pattern_characters += characters
        if self._pattern_characters > MAX_PATTERN_CHARACTERS:
            raise SchemaError(path, f"patterns may have up to {MAX_PATTERN_CHARACTERS:,} characters in all")
        self._pattern_size += size
        if self._pattern_size > MAX_SIZE:
            reason = (
                f"the patterns and formats of a schema, with their repetitions written out, may have {MAX_SIZE:,} "
                "characters in all: use smaller counts, or maxLength instead of patterns"
            )
            raise SchemaError(path, reason)

    def add_definition(self, number: int, name: str, path: Path) -> None:
        self._add_characters(len(name), path)
        if number > MAX_DEFINITIONS:
            raise SchemaError(path, f"references may lead to up to {MAX_DEFINITIONS} definitions")

    def _add_characters(self, count: int, path: Path) -> None:
        self._characters += count
        if self._characters > MAX_CHARACTERS:
            reason = f"names and listed values may have up to {MAX_CHARACTERS:,} characters in all"
            raise SchemaError(path, reason)
