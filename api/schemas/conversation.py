"""Messages and tools of chat requests, in OpenAI's shapes. The worker checks what only a whole conversation shows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from api.schemas.common import MAX_FIELDS, LenientPart, Text

#: Parts of one message's content.
MAX_PARTS = 1_024
#: As at OpenAI.
MAX_TOOLS = 128
#: Calls of one message.
MAX_CALLS = 128

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
CallId = Annotated[str, Field(min_length=1, max_length=256)]
#: Fields of messages whose empty values clients send back from earlier answers.
_EMPTY_FIELDS = ("annotations", "tool_calls")
_UNSUPPORTED = {
    "function_call": "function_call is the older name: send tool_calls",
    "audio": "audio is not supported",
}


class TextPart(LenientPart):
    type: Literal["text"]
    text: Text


class CalledFunction(LenientPart):
    """A function's name and its arguments: a JSON object, written as a string."""

    name: FunctionName
    arguments: Text


class MessageToolCall(LenientPart):
    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction

    def row(self) -> dict[str, Any]:
        """Returns the call as a row has it, without ignored fields."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": self.type, "function": function}


class ConversationMessage(LenientPart):
    """A message. Its content may be null or empty, as in answers that are sent back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)] = ""
    name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    tool_calls: (
        Annotated[list[MessageToolCall], Field(min_length=1, max_length=MAX_CALLS, fail_fast=True)] | None
    ) = None
    tool_call_id: CallId | None = None
    reasoning_content: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, message: Any) -> Any:
        """Assistant messages of earlier responses have null fields and empty lists."""
        if not isinstance(message, dict):
            return message
        for name, reason in _UNSUPPORTED.items():
            if message.get(name):
                raise ValueError(reason)
        return {
            name: value
            for name, value in message.items()
            if value is not None and name not in _UNSUPPORTED and not (name in _EMPTY_FIELDS and value == [])
        }

    @model_validator(mode="after")
    def _fields_of_its_role(self) -> ConversationMessage:
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a tool message needs the tool_call_id of the call that it answers")
        if self.role != "tool" and self.tool_call_id is not None:
            raise ValueError("tool_call_id belongs to tool messages")
        if self.role != "assistant" and self.tool_calls is not None:
            raise ValueError("tool_calls belong to assistant messages")
        return self

    def turn(self) -> dict[str, Any]:
        """Returns the message as a row has it, without ignored fields."""
        content = self.content
        if isinstance(content, list):
            turn: dict[str, Any] = {"content": [{"type": part.type, "text": part.text} for part in content]}
        else:
            turn = {"content": content}
        if self.name is not None:
            turn["name"] = self.name
        if self.tool_calls is not None:
            turn["tool_calls"] = [call.row() for call in self.tool_calls]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        if self.reasoning_content and self.role == "assistant":
            turn["reasoning_content"] = self.reasoning_content
        return {"role": self.role, **turn}


class Function(LenientPart):
    """A function that may be called. `parameters`: the JSON schema of its arguments, an object's."""

    name: FunctionName
    description: Text | None = None
    parameters: Annotated[dict[str, Any], Field(max_length=MAX_FIELDS)] | None = None
    strict: bool | None = None


class FunctionTool(LenientPart):
    type: Literal["function"]
    function: Function

    def row(self) -> dict[str, Any]:
        """Returns the tool as a row has it, without ignored fields."""
        function = self.function
        fields = {
            "name": function.name,
            "description": function.description,
            "parameters": function.parameters,
        }
        return {
            "type": self.type,
            "function": {name: value for name, value in fields.items() if value is not None},
        }


class NamedFunction(LenientPart):
    name: FunctionName


class NamedToolChoice(LenientPart):
    """The function that the answer must call."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice
