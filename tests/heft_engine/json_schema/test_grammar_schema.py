"""Schemas that a grammar holds, and the part of each other one that it does not hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from heft_engine.json_schema import whole_schema
from heft_engine.json_schema.grammar_schema import grammar_schema
from heft_engine.json_schema.schema_error import Path, SchemaError
from heft_engine.json_schema.schema_limits import SchemaSize

STRING = {"type": "string"}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = STRING
    for _ in range(levels):
        schema = {"type": "object", "properties": {"items": schema}, "required": ["items"]}
    return schema


def object_of(part: Any, **others: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"x": part}, **others}


@pytest.mark.parametrize(
    ("schema", "form"),
    [
        ({}, {}),
        (True, {}),
        ({"title": "Anything", "default": 3}, {}),
        ({"minLength": 2}, {"type": "string", "minLength": 2}),
        ({"minimum": 2}, {"type": "number", "minimum": 2}),
        ({"type": ["integer", "number"]}, {"type": "number"}),
        ({"const": 3}, {"enum": [3]}),
        ({"type": "string", "enum": ["a", "b"]}, {"enum": ["a", "b"]}),
        ({"type": ["integer", "null"], "enum": [1.0, None]}, {"enum": [1.0, None]}),
        (
            {"type": "integer", "exclusiveMinimum": 1.5, "maximum": 9.5},
            {"type": "integer", "minimum": 2, "maximum": 9},
        ),
        ({"type": "integer", "multipleOf": 5, "minimum": 3, "maximum": 16}, {"enum": [5, 10, 15]}),
        ({"type": "integer", "multipleOf": 3}, {"type": "integer", "multipleOf": 3}),
        ({"type": "array"}, {"type": "array", "items": {}, "minItems": 0}),
        (
            {"type": "array", "prefixItems": [STRING], "minItems": 1},
            {"type": "array", "items": False, "minItems": 1, "prefixItems": [STRING], "maxItems": 1},
        ),
        ({"type": "object"}, {"type": "object", "additionalProperties": {}, "minProperties": 0}),
        (
            {"type": "object", "properties": {}},
            {"type": "object", "properties": {}, "required": [], "additionalProperties": False},
        ),
        (
            object_of(STRING, additionalProperties=True),
            {"type": "object", "properties": {"x": STRING}, "required": [], "additionalProperties": False},
        ),
        ({"allOf": [STRING], "description": "one"}, STRING),
        ({"oneOf": [STRING, {"type": "null"}]}, {"anyOf": [STRING, {"type": "null"}]}),
        (
            {"$ref": "#/$defs/A%20~1b", "$defs": {"A /b": STRING}},
            {"$ref": "#/$defs/d0", "$defs": {"d0": STRING}},
        ),
        (
            {"type": "string", "pattern": "[a-z]{2}", "maxLength": 2},
            {"type": "string", "pattern": "^é{0,0}([a-z]{2,2})$"},
        ),
    ],
)
def test_forms(schema: Any, form: Any) -> None:
    assert grammar_schema(schema) == form


def test_a_schema_may_refer_to_itself() -> None:
    tree = object_of({"type": "array", "items": {"$ref": "#"}})
    form = grammar_schema(tree)
    assert form["properties"]["x"]["items"] == {"$ref": "#/$defs/d0"}
    assert form["$defs"]["d0"] == {name: value for name, value in form.items() if name != "$defs"}


CAT, DOG = (
    object_of(STRING) | {"properties": {"kind": {"const": kind}}, "required": ["kind"]}
    for kind in ("cat", "dog")
)


@pytest.mark.parametrize(
    "options",
    [
        [{"type": "integer"}, STRING, {"type": "object"}],
        [CAT, DOG],
        [{"$ref": "#/$defs/cat"}, DOG],
        [{"enum": [1, "a"]}, {"enum": [True, 2]}],
        [{"anyOf": [STRING, {"type": "null"}]}, {"type": "array"}],
        [{"anyOf": [{"$ref": "#/$defs/loop"}, {"type": "null"}]}, STRING],
    ],
)
def test_one_of_options_that_exclude_each_other(options: list[Any]) -> None:
    loop = {"anyOf": [{"$ref": "#/$defs/loop"}, {"type": "null"}]}
    assert "anyOf" in grammar_schema({"oneOf": options, "$defs": {"cat": CAT, "loop": loop}})


@pytest.mark.parametrize(
    ("schema", "path", "reason"),
    [
        (False, (), "allows no value"),
        ([], (), "must be an object"),
        (object_of(3), ("properties", "x"), "must be an object"),
        ({"not": STRING}, ("not",), "list what is allowed"),
        ({"if": {}, "then": {}}, ("if",), "anyOf with an object for each case"),
        (
            object_of({"type": "object", "patternProperties": {}}),
            ("properties", "x", "patternProperties"),
            "not supported",
        ),
        ({"type": "object", "propertyNames": STRING}, ("propertyNames",), "not supported"),
        ({"type": "object", "dependentRequired": {}}, ("dependentRequired",), "not supported"),
        ({"type": "array", "uniqueItems": True}, ("uniqueItems",), "leave it out"),
        ({"type": "array", "contains": STRING}, ("contains",), "not supported"),
        ({"type": "string", "nullable": True}, ("nullable",), "null"),
        ({"type": "string", "surprise": 1}, ("surprise",), "not supported here: leave it out"),
        ({"type": "text"}, ("type",), "must be one or several of"),
        ({"type": []}, ("type",), "must be one or several of"),
        ({"type": "string", "minimum": 3}, ("minimum",), "means nothing for type string"),
        ({"minimum": 3, "minLength": 2}, (), "name its type"),
        ({"$ref": "https://example.org/schema"}, ("$ref",), "into the schema itself"),
        ({"$ref": "#/$defs/Missing"}, ("$ref",), "leads to nothing"),
        ({"$ref": "#/$defs/A", "minLength": 2, "$defs": {"A": STRING}}, ("minLength",), "beside \\$ref"),
        ({"anyOf": [STRING], "type": "string"}, ("type",), "beside anyOf"),
        ({"enum": ["a"], "minLength": 2}, ("minLength",), "beside enum"),
        ({"anyOf": []}, ("anyOf",), "at least one"),
        ({"enum": []}, ("enum",), "at least one"),
        ({"enum": [3], "type": "string"}, ("enum",), "no string"),
        ({"allOf": [STRING, STRING]}, ("allOf",), "write them as one schema"),
        ({"oneOf": [STRING, {"enum": ["a"]}]}, ("oneOf",), "option 0 and option 1"),
        ({"oneOf": [CAT, CAT]}, ("oneOf",), "use anyOf"),
        ({"oneOf": [{"enum": [1]}, {"enum": [1.0]}]}, ("oneOf",), "use anyOf"),
        ({"oneOf": [{"const": n} for n in range(101)]}, ("oneOf",), "up to 100 options"),
        ({"type": "string", "pattern": "a(?=b)"}, ("pattern",), "lookaround"),
        ({"type": "string", "pattern": 3}, ("pattern",), "must be a text"),
        ({"type": "string", "format": "uri"}, ("format",), "only date, date-time"),
        ({"type": "string", "format": "uuid", "pattern": "a"}, ("format",), "beside pattern"),
        (
            {"type": "string", "pattern": "a+", "maxLength": 5},
            ("pattern",),
            "outside of minLength and maxLength",
        ),
        ({"type": "string", "minLength": -1}, ("minLength",), "from 0 to"),
        ({"type": "string", "maxLength": 10**7}, ("maxLength",), "from 0 to"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, ("minLength",), "larger than maxLength"),
        ({"type": "integer", "minimum": "3"}, ("minimum",), "must be a number"),
        ({"type": "integer", "minimum": 2**54}, ("minimum",), "lies between"),
        ({"type": "integer", "minimum": 2, "exclusiveMaximum": 2}, (), "no integer lies"),
        ({"type": "integer", "multipleOf": 0.5}, ("multipleOf",), "must be an integer"),
        ({"type": "integer", "multipleOf": 5, "minimum": 0}, ("multipleOf",), "needs both"),
        ({"type": "integer", "multipleOf": 5, "minimum": 6, "maximum": 9}, ("multipleOf",), "no multiple"),
        (
            {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 10**6},
            ("multipleOf",),
            "move them closer",
        ),
        ({"type": "number", "multipleOf": 0.1}, ("multipleOf",), "integers alone"),
        ({"type": "number", "minimum": 1e12}, ("minimum",), "decimals"),
        ({"type": "number", "maximum": 1e-9}, ("maximum",), "decimals"),
        ({"type": "number", "minimum": 2, "maximum": 1}, (), "no number"),
        ({"type": "number", "minimum": 1, "exclusiveMaximum": 1.000002}, (), "no number"),
        ({"type": "array", "prefixItems": 3}, ("prefixItems",), "list of schemas"),
        ({"type": "array", "prefixItems": [STRING], "minItems": 2}, (), "no array"),
        ({"type": "array", "prefixItems": [STRING, STRING], "maxItems": 1}, (), "no array"),
        ({"type": "array", "maxItems": 0, "items": {"not": {}}}, ("items", "not"), "not supported"),
        (object_of(STRING, required=["y"]), ("required",), "y is required and not in properties"),
        (object_of(STRING, required="x"), ("required",), "list of names"),
        (object_of(STRING, required=["x"] * 1_000), ("required",), "lists a name twice"),
        ({"type": "object", "properties": []}, ("properties",), "object of schemas"),
        (object_of(STRING, additionalProperties=STRING), ("additionalProperties",), "set it to false"),
        (object_of(STRING, minProperties=2), (), "no object"),
        ({"type": "object", "minProperties": 2}, ("minProperties",), "needs properties"),
        (
            {"type": "object", "properties": {f"p{n}": {} for n in range(400)}},
            ("required",),
            "allow null instead",
        ),
        (
            {"type": "object", "properties": {f"p{n}": {} for n in range(21)}, "minProperties": 2},
            (),
            "up to 20 properties",
        ),
        (object_of({"$ref": "#"}, required=["x"]), (), "no text of it ends"),
        (
            object_of({"$ref": "#/$defs/A"})
            | {"$defs": {"A": object_of({"$ref": "#/$defs/A"}, required=["x"])}},
            ("$defs", "A"),
            "allow null",
        ),
        (nested(11), ("properties", "items") * 10, "10 levels"),
        (object_of({"$id": "a"}), ("properties", "x", "$id"), "not supported"),
        (object_of({"enum": [str(n) for n in range(1_001)]}), ("properties", "x", "enum"), "1,000 values"),
        ({"enum": [f"{n:0100}" for n in range(251)]}, ("enum",), "15,000 characters"),
        ({"enum": ["a" * 120_001]}, ("enum",), "120,000 characters"),
        (
            {"type": "object", "properties": {f"p{n}": {} for n in range(2_001)}},
            ("properties",),
            "2,000 properties",
        ),
        (
            {
                "type": "object",
                "properties": {f"p{n}": {"type": "string", "pattern": "a{400}"} for n in range(4)},
            },
            ("properties", "p3", "pattern"),
            "1,500 characters in all",
        ),
    ],
)
def test_what_a_grammar_cannot_hold(schema: Any, path: Path, reason: str) -> None:
    with pytest.raises(SchemaError, match=reason) as refusal:
        grammar_schema(schema)
    assert refusal.value.path == path


def test_large_objects_may_require_all_of_their_properties() -> None:
    names = [f"p{number}" for number in range(2_000)]
    form = grammar_schema({"type": "object", "properties": dict.fromkeys(names, STRING), "required": names})
    assert form["required"] == names


def test_definitions_and_steps_are_limited() -> None:
    many = {
        "type": "object",
        "properties": {str(n): {"$ref": f"#/$defs/{n}"} for n in range(501)},
        "required": [str(n) for n in range(501)],
        "$defs": {str(n): STRING for n in range(501)},
    }
    with pytest.raises(SchemaError, match="500 definitions"):
        grammar_schema(many)
    deep: dict[str, Any] = STRING
    for _ in range(60):
        deep = {"anyOf": [deep]}
    with pytest.raises(SchemaError, match="100 steps"):
        grammar_schema(deep)
    assert grammar_schema(nested(10))


def arrays(lengths: Iterable[int]) -> list[dict[str, Any]]:
    """Returns arrays of values of the whole schema."""
    return [{"type": "array", "items": {"$ref": "#"}, "maxItems": length} for length in lengths]


def kinds(number: int) -> list[dict[str, Any]]:
    """Returns objects of the whole schema's values, each with a kind of its own."""
    return [
        {"type": "object", "properties": {"kind": {"const": n}, "x": {"$ref": "#"}}, "required": ["kind"]}
        for n in range(number)
    ]


class TestWorkIsLimited:
    """Nothing that is accepted takes long to check, to compile or to write."""

    @pytest.mark.parametrize(
        ("schema", "path", "reason"),
        [
            ({"enum": [["a" * 300_000]]}, (), "250,000 characters as JSON"),
            ({"anyOf": [{"type": "array", "items": {}}] * 501}, ("anyOf",), "up to 500 options"),
            (
                {"type": "object", "properties": {f"p{n}": {"anyOf": [STRING] * 400} for n in range(30)}},
                ("properties", "p24", "anyOf", 374),
                "10,000 schemas within",
            ),
            (
                {
                    "oneOf": [
                        {"anyOf": [{"type": name, low: n} for n in range(150)]}
                        for name, low in (("string", "minLength"), ("number", "minimum"))
                    ]
                },
                ("oneOf",),
                "too many options",
            ),
            ({"anyOf": arrays(range(130))}, (), "up to 16 arrays"),
            (
                {"anyOf": [{"type": "object", "additionalProperties": {"$ref": "#"}}, *arrays(range(18))]},
                (),
                "up to 16 arrays",
            ),
            ({"anyOf": kinds(120)}, (), "up to 20,000"),
            (
                {"type": "array", "prefixItems": [{"type": "object"}] * 330},
                (),
                "up to 20,000",
            ),
            (
                {"anyOf": [{"$ref": f"#/$defs/{n}"} for n in range(20)]}
                | {"$defs": {str(n): arrays([n])[0] for n in range(20)}},
                (),
                "up to 16 arrays",
            ),
            (
                {"type": "array", "prefixItems": [{"type": "string", "pattern": "(?:)" * 200}] * 20},
                ("prefixItems", 12, "pattern"),
                "10,000 characters in all",
            ),
            ({"type": "string", "pattern": "|" * 1_001}, ("pattern",), "longer than 1,000 characters"),
        ],
    )
    def test_what_is_too_large(self, schema: Any, path: Path, reason: str) -> None:
        with pytest.raises(SchemaError, match=reason) as refusal:
            grammar_schema(schema)
        assert refusal.value.path == path

    def test_unions_of_usual_size_are_accepted(self) -> None:
        null = {"type": "null"}
        assert len(grammar_schema({"oneOf": [*kinds(60), null]})["anyOf"]) == 61
        assert len(grammar_schema({"oneOf": [*kinds(60), null], "$defs": {}})["$defs"]["d0"]["anyOf"]) == 61
        assert grammar_schema({"anyOf": [*arrays([5]), null]})
        pair = {"anyOf": [{"type": "array", "items": part} for part in (STRING, null)]}
        assert grammar_schema({"type": "object", "properties": {f"p{n}": pair for n in range(100)}})

    def test_equal_options_are_one(self) -> None:
        assert grammar_schema({"anyOf": [STRING, {"type": "null"}, STRING]})["anyOf"] == [
            STRING,
            {"type": "null"},
        ]
        assert grammar_schema({"anyOf": [STRING, STRING]}) == STRING
        assert grammar_schema({"anyOf": arrays([3] * 100)})["items"]

    def test_ends_are_found_in_one_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A chain of definitions, each of which ends after the next one has."""
        looks = []
        unavoidable = whole_schema._unavoidable

        def counted(schema: Any) -> list[Any]:
            looks.append(schema)
            return list(unavoidable(schema))

        monkeypatch.setattr(whole_schema, "_unavoidable", counted)
        chain = {str(n): object_of({"$ref": f"#/$defs/{n + 1}"}, required=["x"]) for n in range(498)}
        grammar_schema({"$ref": "#/$defs/0", "$defs": chain | {"498": STRING}})
        assert len(looks) == 499

    def test_schemas_of_one_grammar_are_counted_together(self) -> None:
        optional = {"type": "object", "properties": {f"p{n}": STRING for n in range(300)}}
        size = SchemaSize()
        grammar_schema(optional, size=size)
        with pytest.raises(SchemaError, match="too many optional properties"):
            grammar_schema(optional, size=size)


class TestStrict:
    def test_every_object_names_and_requires_its_properties(self) -> None:
        inner = object_of(STRING, required=["x"], additionalProperties=False)
        schema = object_of(inner, required=["x"], additionalProperties=False)
        assert grammar_schema(schema, strict=True) == grammar_schema(schema)

    @pytest.mark.parametrize(
        ("schema", "path", "reason"),
        [
            (STRING, (), "must have"),
            (
                {"anyOf": [object_of(STRING, required=["x"], additionalProperties=False), STRING]},
                (),
                "no anyOf",
            ),
            (object_of(STRING, required=["x"]), ("additionalProperties",), "additionalProperties: false"),
            (object_of(STRING, additionalProperties=False), ("required",), "x is not"),
            (
                object_of(object_of(STRING), required=["x"], additionalProperties=False),
                ("properties", "x", "additionalProperties"),
                "additionalProperties: false",
            ),
        ],
    )
    def test_what_is_refused(self, schema: Any, path: Path, reason: str) -> None:
        with pytest.raises(SchemaError, match=reason) as refusal:
            grammar_schema(schema, strict=True)
        assert refusal.value.path == path
