"""Limits of a schema's size: OpenAI's, and those that keep its check and its grammar quick."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from heft_engine.json_schema.schema_error import Path, SchemaError
from heft_engine.json_schema.string_patterns import MAX_SIZE

#: OpenAI's: levels of objects and arrays, properties in all, characters of names and of listed values, listed values,
#: and characters of an enum with more than 250 texts.
MAX_DEPTH = 10
MAX_PROPERTIES = 5_000
MAX_CHARACTERS = 120_000
MAX_ENUM_VALUES = 1_000
MAX_LONG_ENUM_CHARACTERS = 15_000
_LONG_ENUM = 250
#: Our own: parts that references lead to, alternatives that must exclude each other, steps from the schema to a part.
MAX_DEFINITIONS = 500
MAX_EXCLUSIVE_OPTIONS = 100
MAX_STEPS = 100
#: The sum of the squares of objects' numbers of optional properties: any may follow any other one before it, and a
#: thousand in one object take a minute to compile. With minProperties or maxProperties, which count them: properties of
#: one object.
MAX_OPTIONAL_PAIRS = 100_000
MAX_COUNTED_PROPERTIES = 20


class SchemaSize:
    """Counts a schema's parts. Raises SchemaError, with the part's path, for one too many."""

    def __init__(self) -> None:
        self._properties = self._characters = self._enum_values = self._pattern_size = 0
        self._optional_pairs = 0

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

    def add_pattern(self, size: int, path: Path) -> None:
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
