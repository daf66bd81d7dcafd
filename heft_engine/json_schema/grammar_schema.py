"""JSON schemas of answers, in the form that xgrammar turns into a grammar exactly.

xgrammar ignores what it can't hold: a part of the vocabulary (`not`, `uniqueItems`, `contains`, ...), keywords beside
`$ref`, `anyOf` or `enum`, and a `required` property that `properties` lacks. `grammar_schema` reads a schema, writes
down what it means in the keywords that are exact, and refuses the rest by path, so that every text of the grammar
validates. A grammar may allow less than its schema does:

- properties come in the order of the schema, and an object with `properties` has no others;
- a pattern is matched in whole, a format has a common form (heft_engine.json_schema.string_patterns);
- strings with a length, a pattern or a format hold no quotes, backslashes or control characters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

from heft_engine.json_schema.keywords import ADVICE, ANNOTATIONS, COMBINERS, KEYWORDS, TYPED
from heft_engine.json_schema.number_bounds import integer_schema, number_schema
from heft_engine.json_schema.schema_error import Path, SchemaError
from heft_engine.json_schema.schema_limits import (
    MAX_DEPTH,
    MAX_EXCLUSIVE_OPTIONS,
    MAX_OPTIONS,
    MAX_STEPS,
    SchemaSize,
)
from heft_engine.json_schema.string_formats import FORMATS, format_pattern
from heft_engine.json_schema.string_patterns import PatternError, parse_pattern
from heft_engine.json_schema.whole_schema import WholeSchema, type_of

#: Largest length of a string or an array in a bound.
MAX_LENGTH = 1_000_000


def grammar_schema(schema: Any, *, strict: bool = False, size: SchemaSize | None = None) -> dict[str, Any]:
    """Returns a schema for xgrammar, every text of whose grammar validates against `schema`.

    strict: OpenAI's rules hold, too: every object requires all of its properties and allows no others. size: counts
    the parts of all schemas of a grammar, which the limits are for. Raises SchemaError.
    """
    size = size or SchemaSize()
    size.add_schema(schema)
    reader = _Reader(schema, strict, size)
    root = reader.read(schema, ())
    if strict and root.get("type") != "object":
        raise SchemaError((), 'with strict: true the schema itself must have "type": "object", and no anyOf')
    definitions = reader.read_definitions()
    whole = WholeSchema(root, definitions, reader.definition_paths, size)
    whole.check_choices()
    for options, path in reader.exclusive:
        whole.check_disjoint(options, path)
    whole.check_ends()
    return root | ({"$defs": definitions} if definitions else {})


class _Reader:
    """Reads a schema's parts. `root` is where references lead."""

    def __init__(self, root: Any, strict: bool, size: SchemaSize) -> None:
        self._root = root
        self._strict = strict
        self._names: dict[Path, str] = {}
        self._unread: list[Path] = []
        #: Options of `oneOf` with their paths.
        self.exclusive: list[tuple[list[dict[str, Any]], Path]] = []
        self._size = size
        self._depth = 0
        self._readers: Mapping[str, Callable[[Mapping[str, Any], Path], dict[str, Any]]] = {
            "string": self._string,
            "number": number_schema,
            "integer": integer_schema,
            "array": self._array,
            "object": self._object,
            "boolean": lambda schema, path: {"type": "boolean"},
            "null": lambda schema, path: {"type": "null"},
        }

    @property
    def definition_paths(self) -> dict[str, Path]:
        """The paths of the definitions that references lead to, by name."""
        return {name: path for path, name in self._names.items()}

    def read_definitions(self) -> dict[str, dict[str, Any]]:
        """Reads what references lead to, and what references there lead to. Returns it by name."""
        definitions = {}
        while self._unread:
            path = self._unread.pop()
            definitions[self._names[path]] = self.read(self._at(path), path)
        return definitions

    def read(self, schema: Any, path: Path) -> dict[str, Any]:
        """Returns the exact form of a part of the schema. Raises SchemaError."""
        if len(path) > MAX_STEPS:
            raise SchemaError(path, f"it lies more than {MAX_STEPS} steps deep in the schema")
        self._size.add_part(path)
        if schema is True:
            return {}
        if schema is False:
            raise SchemaError(path, "false allows no value: leave it out")
        if not isinstance(schema, dict):
            raise SchemaError(path, "a schema must be an object")
        self._check_keywords(schema, path)
        combiner = next((name for name in COMBINERS if name in schema), None)
        if combiner is not None:
            return self._combined(schema, combiner, path)
        types = self._types(schema, path)
        if types is None:
            return {}
        used = ANNOTATIONS.union(*(KEYWORDS[name] for name in types), {"type"})
        idle = next((name for name in schema if name not in used), None)
        if idle is not None:
            raise SchemaError(
                (*path, idle), f"{idle} means nothing for type {' or '.join(types)}: leave it out"
            )
        options = [self._typed(name, schema, path) for name in types]
        return options[0] if len(options) == 1 else {"anyOf": options}

    def _typed(self, name: str, schema: Mapping[str, Any], path: Path) -> dict[str, Any]:
        is_nesting = name in ("array", "object")
        self._depth += is_nesting
        if self._depth > MAX_DEPTH:
            raise SchemaError(
                path, f"objects and arrays may be nested {MAX_DEPTH} levels deep: use $defs and $ref"
            )
        form = self._readers[name](schema, path)
        self._depth -= is_nesting
        return form

    def _check_keywords(self, schema: Mapping[str, Any], path: Path) -> None:
        for name in schema:
            if (name not in TYPED and name not in COMBINERS) or (name == "$id" and path):
                advice = ADVICE.get(name, "leave it out")
                raise SchemaError((*path, name), f"the keyword {name} is not supported here: {advice}")

    def _types(self, schema: Mapping[str, Any], path: Path) -> list[str] | None:
        """Returns the types that a schema names, or the one that its keywords are for; None for any."""
        if "type" not in schema:
            meant = [name for name, keywords in KEYWORDS.items() if keywords & schema.keys()]
            if len(meant) > 1 and meant != ["number", "integer"]:
                raise SchemaError(path, "it has keywords of several types: name its type")
            return meant[:1] or None
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        unknown = [name for name in types if not isinstance(name, str) or name not in KEYWORDS]
        if unknown or not types or len(set(types)) < len(types):
            raise SchemaError((*path, "type"), f"must be one or several of {', '.join(KEYWORDS)}")
        if "number" in types and "integer" in types:
            return [name for name in types if name != "integer"]
        return types

    def _combined(self, schema: Mapping[str, Any], combiner: str, path: Path) -> dict[str, Any]:
        """Reads a schema of `$ref`, `const`, `enum`, `anyOf`, `oneOf` or `allOf`, which stands alone."""
        beside = {"type"} if combiner in ("const", "enum") else set()
        rest = [name for name in schema if name not in ANNOTATIONS | beside | {combiner}]
        if rest:
            reason = f"{rest[0]} beside {combiner} is not supported: write both as one schema"
            raise SchemaError((*path, rest[0]), reason)
        here = (*path, combiner)
        if combiner == "$ref":
            return {"$ref": f"#/$defs/{self._reference(schema['$ref'], here)}"}
        if combiner == "const":
            return self._values([schema["const"]], schema, here)
        parts = schema[combiner]
        if not isinstance(parts, list) or not parts:
            raise SchemaError(here, "must be a list with at least one item")
        if combiner == "enum":
            return self._values(parts, schema, here)
        if combiner == "allOf" and len(parts) > 1:
            raise SchemaError(here, "allOf with several schemas is not supported: write them as one schema")
        most = MAX_EXCLUSIVE_OPTIONS if combiner == "oneOf" else MAX_OPTIONS
        if len(parts) > most:
            raise SchemaError(here, f"{combiner} may have up to {most} options")
        options = [self.read(part, (*here, index)) for index, part in enumerate(parts)]
        if combiner == "oneOf":
            self.exclusive.append((options, here))
        if len(options) > 1:
            options = list({json.dumps(option): option for option in options}.values())
        return options[0] if len(options) == 1 else {"anyOf": options}

    def _values(self, values: list[Any], schema: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """Reads listed values, each of which must have the schema's type."""
        self._size.add_values(values, path)
        if "type" in schema:
            types = self._types(schema, path[:-1]) or []
            for value in values:
                is_integer = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
                fits = type_of(value) in types or (
                    "integer" in types and type_of(value) == "number" and is_integer
                )
                if not fits:
                    raise SchemaError(path, f"a value is no {' or '.join(types)}, as the type beside it says")
        return {"enum": values}

    def _reference(self, reference: Any, path: Path) -> str:
        """Returns the name of the definition that a reference leads to."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise SchemaError(path, "a $ref must lead into the schema itself, such as #/$defs/Name")
        steps = [unquote(step).replace("~1", "/").replace("~0", "~") for step in reference.split("/")[1:]]
        target: Path = tuple(steps)
        if target not in self._names:
            try:
                self._at(target)
            except (KeyError, IndexError, TypeError, ValueError):
                raise SchemaError(path, f"{reference} leads to nothing in the schema") from None
            self._size.add_definition(len(self._names) + 1, steps[-1] if steps else "", path)
            self._names[target] = f"d{len(self._names)}"
            self._unread.append(target)
        return self._names[target]

    def _at(self, path: Path) -> Any:
        part = self._root
        for step in path:
            part = part[int(step)] if isinstance(part, list) else part[step]
        return part

    def _string(self, schema: Mapping[str, Any], path: Path) -> dict[str, Any]:
        least, most = self._bounds(schema, path, "minLength", "maxLength")
        if "format" in schema and "pattern" in schema:
            raise SchemaError(
                (*path, "format"), "format beside pattern is not supported: leave one of them out"
            )
        keyword = next((name for name in ("pattern", "format") if name in schema), None)
        if keyword is None:
            bounds = {"minLength": least or None, "maxLength": most}
            return {"type": "string"} | {name: bound for name, bound in bounds.items() if bound is not None}
        here = (*path, keyword)
        text = schema[keyword]
        if not isinstance(text, str):
            raise SchemaError(here, "must be a text")
        if keyword == "format" and text not in FORMATS:
            raise SchemaError(here, f"the format {text} is not supported, only {', '.join(FORMATS)}")
        try:
            pattern = parse_pattern(text) if keyword == "pattern" else format_pattern(text)
        except PatternError as error:
            raise SchemaError(here, f"the pattern is not supported: {error}") from None
        self._size.add_pattern(pattern.size, len(text), here)
        longest = pattern.max_length
        if pattern.min_length < least or (most is not None and (longest is None or longest > most)):
            reason = f"the {keyword} allows strings outside of minLength and maxLength: put the lengths into a pattern"
            raise SchemaError(here, reason)
        return {"type": "string", "pattern": pattern.text}

    def _array(self, schema: Mapping[str, Any], path: Path) -> dict[str, Any]:
        least, most = self._bounds(schema, path, "minItems", "maxItems")
        if schema.get("uniqueItems", False) is not False:
            raise SchemaError((*path, "uniqueItems"), "uniqueItems is not supported: leave it out")
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            raise SchemaError((*path, "prefixItems"), "must be a list of schemas")
        prefix = [self.read(item, (*path, "prefixItems", index)) for index, item in enumerate(first)]
        items = schema.get("items", not prefix)
        has_more = items is not False and (most is None or most > len(prefix))
        if (most is not None and most < len(prefix)) or (not has_more and least > len(prefix)):
            raise SchemaError(
                path, "no array has as many items as minItems, maxItems and prefixItems ask for"
            )
        # Also where none is written: a part that is not supported is never passed over.
        rest = self.read(items, (*path, "items")) if items is not False else False
        array: dict[str, Any] = {"type": "array", "items": rest if has_more else False, "minItems": least}
        if prefix:
            array["prefixItems"] = prefix
        if most is not None or not has_more:
            array["maxItems"] = most if has_more else len(prefix)
        return array

    def _object(self, schema: Mapping[str, Any], path: Path) -> dict[str, Any]:
        if self._strict and (schema.get("additionalProperties") is not False or "properties" not in schema):
            reason = "with strict: true every object needs properties, and additionalProperties: false"
            raise SchemaError((*path, "additionalProperties"), reason)
        least, most = self._bounds(schema, path, "minProperties", "maxProperties")
        required = self._required(schema, path)
        others = schema.get("additionalProperties", "properties" not in schema)
        limits = {} if most is None else {"maxProperties": most}
        if not schema.get("properties") and others is not False:
            if least > 1:
                reason = "minProperties above 1 needs properties, and additionalProperties: false"
                raise SchemaError((*path, "minProperties"), reason)
            values = self.read(others, (*path, "additionalProperties"))
            return {"type": "object", "additionalProperties": values, "minProperties": least, **limits}
        if others not in (True, False, {}):
            reason = "a schema for other properties beside properties is not supported: set it to false"
            raise SchemaError((*path, "additionalProperties"), reason)
        properties = {
            name: self.read(part, (*path, "properties", name))
            for name, part in schema.get("properties", {}).items()
        }
        least = max(least, len(required))
        if least > len(properties) or (most is not None and most < least):
            raise SchemaError(
                path, "no object has as many properties as minProperties and maxProperties ask for"
            )
        if least > len(required):
            limits["minProperties"] = least
        optional = len(properties) - len(required)
        self._size.add_object(len(properties), optional, path, are_counted=bool(limits and optional))
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
            **limits,
        }

    def _required(self, schema: Mapping[str, Any], path: Path) -> list[str]:
        """Checks the names of properties and returns the required ones."""
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict):
            raise SchemaError((*path, "properties"), "must be an object of schemas")
        self._size.add_properties(list(properties), (*path, "properties"))
        here = (*path, "required")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise SchemaError(here, "must be a list of names")
        names = set(required)
        if len(names) < len(required):
            raise SchemaError(here, "it lists a name twice")
        missing = [name for name in required if name not in properties]
        if missing:
            raise SchemaError(here, f"{missing[0]} is required and not in properties: describe it there")
        optional = [name for name in properties if name not in names]
        if self._strict and optional:
            reason = (
                f"with strict: true every property is required, and {optional[0]} is not: allow null instead"
            )
            raise SchemaError(here, reason)
        return [name for name in properties if name in names]

    def _bounds(self, schema: Mapping[str, Any], path: Path, low: str, high: str) -> tuple[int, int | None]:
        for name in (low, high):
            bound = schema.get(name, 0)
            if isinstance(bound, bool) or not isinstance(bound, int) or not 0 <= bound <= MAX_LENGTH:
                raise SchemaError((*path, name), f"must be an integer from 0 to {MAX_LENGTH:,}")
        least, most = schema.get(low, 0), schema.get(high)
        if most is not None and least > most:
            raise SchemaError((*path, low), f"is larger than {high}")
        return least, most
