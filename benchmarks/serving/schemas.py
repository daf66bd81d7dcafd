"""Twenty JSON schemas whose answers are bounded, each with a question."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _object(**properties: Any) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _text(longest: int) -> Schema:
    return {"type": "string", "maxLength": longest}


def _integer(least: int, most: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def _list(items: Schema, most: int) -> Schema:
    return {"type": "array", "items": items, "maxItems": most}


def _number(least: float, most: float) -> Schema:
    return {"type": "number", "minimum": least, "maximum": most}


_POINT = _object(x=_number(-90, 90), y=_number(-180, 180))
_SHAPES = [
    _object(kind={"const": "circle"}, radius=_number(0, 10)),
    _object(kind={"const": "square"}, side=_number(0, 10)),
]

#: A question to each schema.
SCHEMAS: dict[str, Schema] = {
    "Describe a person.": _object(name=_text(20), age=_integer(0, 120)),
    "Name a colour.": {"enum": ["red", "green", "blue", "yellow"]},
    "Is the sky blue?": _object(answer={"type": "boolean"}, confidence=_number(0, 1)),
    "List three fruits.": {"type": "array", "items": _text(12), "minItems": 3, "maxItems": 3},
    "Where is Rome?": _object(city={"const": "Rome"}, place=_POINT),
    "When did it happen?": _object(day={"type": "string", "format": "date"}),
    "Give a phone number.": {"type": "string", "pattern": r"^\+\d{2} \d{3}-\d{4}$"},
    "Draw a shape.": {"oneOf": _SHAPES},
    "Rate the film.": _object(stars=_integer(1, 5), review={"anyOf": [_text(40), {"type": "null"}]}),
    "What is in the basket?": _list(_object(item=_text(10), count=_integer(1, 9)), 3),
    "Write an identifier.": _object(id={"type": "string", "format": "uuid"}),
    "How much is it?": _object(price=_integer(0, 100_000), currency={"enum": ["EUR", "USD", "JPY"]}),
    "Pick an even number.": {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": 2},
    "Write to somebody.": _object(to={"type": "string", "format": "email"}, subject=_text(30)),
    "Order a pizza.": _object(
        size={"enum": ["small", "large"]}, toppings=_list({"enum": ["ham", "corn", "egg"]}, 4)
    ),
    "Classify the text.": _object(
        label={"enum": ["spam", "ham"]}, reasons={"type": "array", "items": _text(20), "maxItems": 2}
    ),
    "Plan a route.": {"type": "array", "prefixItems": [_POINT, _POINT], "minItems": 2, "maxItems": 2},
    "Describe a machine.": _object(
        host={"type": "string", "format": "ipv4"}, disks=_list(_object(gigabytes=_integer(1, 4_096)), 2)
    ),
    "Translate the word.": _object(
        word={"type": "string", "pattern": "^[a-z]{1,12}$"}, language={"$ref": "#/$defs/Language"}
    )
    | {"$defs": {"Language": {"enum": ["de", "fr", "it"]}}},
    "Describe a family.": _object(
        parents=_list(_object(name=_text(10)), 2),
        children=_list(_object(name=_text(10), age=_integer(0, 30)), 3),
    ),
}
