"""The `response_format` of chat requests: text, any JSON object, or JSON of a schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from api.schemas.common import MAX_FIELDS, LenientPart, Text, dotted
from heft_engine.json_schema.grammar_schema import grammar_schema
from heft_engine.json_schema.schema_error import SchemaError
from heft_engine.json_schema.schema_limits import SchemaSize
from store.messages.generate import Constraint

_FIELD = "response_format"


class SchemaReader(Protocol):
    """A function that returns a schema as grammars hold it, or raises SchemaError."""

    def __call__(self, schema: Mapping[str, Any], /, *, strict: bool, size: SchemaSize) -> dict[str, Any]: ...


def checked_schema(
    schema: Mapping[str, Any],
    field: str,
    *,
    strict: bool,
    size: SchemaSize,
    read: SchemaReader = grammar_schema,
) -> dict[str, Any]:
    """Returns a schema as grammars hold it. Raises PydanticCustomError with the path of the part at fault.

    `size` counts the parts of all schemas of a request.
    """
    try:
        return read(schema, strict=strict, size=size)
    except SchemaError as error:
        # Paths of schemas may be named like anything, and the message is a template.
        path = dotted([field, *error.path])
        raise PydanticCustomError(
            "unsupported", "{reason}", {"path": path, "reason": error.reason}
        ) from error


class TextFormat(LenientPart):
    type: Literal["text"]

    def constraint(self) -> Constraint | None:
        return None


class JsonObjectFormat(LenientPart):
    """Any JSON object."""

    type: Literal["json_object"]

    def constraint(self) -> Constraint:
        source = json.dumps(grammar_schema({"type": "object"}))
        return Constraint(kind="json_schema", source=source, param=_FIELD)


class AnswerSchema(LenientPart):
    """A named JSON schema. Without one, any JSON object matches. `strict`: OpenAI's rules for schemas hold, too."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    json_schema: Annotated[dict[str, Any], Field(max_length=MAX_FIELDS)] | None = Field(None, alias="schema")
    strict: bool | None = None
    _size: SchemaSize = PrivateAttr(default_factory=SchemaSize)

    @property
    def size(self) -> SchemaSize:
        """The count of the schema's parts."""
        return self._size

    @cached_property
    def grammar_schema(self) -> dict[str, Any]:
        """The schema as grammars hold it. Raises PydanticCustomError."""
        schema = {"type": "object"} if self.json_schema is None else self.json_schema
        field = f"{_FIELD}.json_schema.schema"
        return checked_schema(schema, field, strict=bool(self.strict), size=self._size)

    @model_validator(mode="after")
    def _grammar_holds_it(self) -> AnswerSchema:
        assert isinstance(self.grammar_schema, dict)  # or it has raised
        return self


class JsonSchemaFormat(LenientPart):
    """JSON that validates against a schema."""

    type: Literal["json_schema"]
    json_schema: AnswerSchema

    def constraint(self) -> Constraint:
        source = json.dumps(self.json_schema.grammar_schema)
        return Constraint(kind="json_schema", source=source, param=f"{_FIELD}.json_schema.schema")


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]
