"""Tools, tool calls and their ids in chat rows and chat requests, as in OpenAI's API."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heft_engine.data.row_fields import boolean, check_json, json_type, refuse_unknown, text, without_nulls
from heft_engine.errors import RowError

#: As at OpenAI.
MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that the assistant may call. `parameters`: the JSON schema of its arguments, an object."""

    name: str
    description: str | None
    parameters: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Returns the tool as chat templates read it, its fields always in the same order."""
        description = {} if self.description is None else {"description": self.description}
        return {
            "type": "function",
            "function": {"name": self.name, **description, "parameters": dict(self.parameters)},
        }


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call of a function. `arguments`: a JSON object, as text."""

    id: str
    name: str
    arguments: str


class ConversationCalls:
    """The calls of a conversation, message by message, against which its tool messages are checked.

    `offered`: the functions that may be called; None for any.
    """

    def __init__(self, *, offered: Collection[str] | None) -> None:
        self._offered = offered
        self._functions: dict[str, str] = {}  #: of the calls so far, by id
        self._unanswered: list[str] = []

    def of_message(self, fields: Mapping[str, object], path: str) -> tuple[ToolCall, ...]:
        """Returns the calls of the assistant message at `path`. Raises RowError."""
        if "tool_calls" in fields and "function_call" in fields:
            raise RowError(
                f"{path} has tool_calls and function_call, the older name: set one of them",
                param=f"{path}.function_call",
            )
        if "function_call" in fields:
            calls_path = f"{path}.function_call"
            calls = [self._call(fields["function_call"], calls_path, call_id=f"call_{path}")]
        else:
            calls_path = f"{path}.tool_calls"
            items = _array(fields.get("tool_calls"), calls_path)
            calls = [self._tool_call(item, f"{calls_path}[{index}]") for index, item in enumerate(items)]
        ids: set[str] = set()
        for index, call in enumerate(calls):
            if call.id in ids:
                param = f"{calls_path}[{index}].id"
                raise RowError(f"{param} {call.id!r} is the id of another call of the message", param=param)
            ids.add(call.id)
            self._functions[call.id] = call.name
        # Conversations may use an id again: a result belongs to the last call before it.
        self._unanswered = [call_id for call_id in self._unanswered if call_id not in ids]
        self._unanswered += [call.id for call in calls]
        return tuple(calls)

    def _tool_call(self, item: object, path: str) -> ToolCall:
        fields = without_nulls(item, path, param=path)
        _check_type(fields, path)
        # Streamed calls are often sent back with the index that they were streamed with.
        refuse_unknown(fields, ("id", "type", "function", "index"), prefix=f"{path}.")
        call_id = text(fields.get("id"), f"{path}.id")
        return self._call(fields.get("function"), f"{path}.function", call_id=call_id)

    def _call(self, value: object, path: str, *, call_id: str) -> ToolCall:
        fields = without_nulls(value, path, param=path)
        refuse_unknown(fields, ("name", "arguments"), prefix=f"{path}.")
        name = _name(fields.get("name"), f"{path}.name")
        if self._offered is not None and name not in self._offered:
            # The model would learn to make names up.
            raise RowError(
                f"{path}.name {name!r} is not the name of one of the row's tools: add it to tools",
                param=f"{path}.name",
            )
        arguments = text(fields.get("arguments"), f"{path}.arguments")
        parse_arguments(arguments, f"{path}.arguments")
        return ToolCall(id=call_id, name=name, arguments=arguments)

    def result_of(self, value: object, path: str) -> str:
        """Returns the id of an unanswered call. Raises RowError for any other value."""
        call_id = text(value, path)
        if call_id not in self._functions:
            raise RowError(f"{path} {call_id!r} is not the id of a tool call before it", param=path)
        if call_id not in self._unanswered:
            raise RowError(f"{path} {call_id!r} has been answered by an earlier tool message", param=path)
        self._unanswered.remove(call_id)
        return call_id

    def result_of_function(self, name: str | None, path: str) -> str:
        """Returns the id of the first unanswered call of a function, for messages of the older role `function`."""
        if name is None:
            raise RowError(f"{path} is missing", param=path)
        for call_id in self._unanswered:
            if self._functions[call_id] == name:
                self._unanswered.remove(call_id)
                return call_id
        raise RowError(f"{path} {name!r} is not the function of a call before it", param=path)

    def function_of(self, call_id: str | None) -> str | None:
        return self._functions[call_id] if call_id is not None else None


def parse_tools(value: object) -> tuple[Tool, ...]:
    """Returns the tools of a row or a request. Raises RowError with the field, such as `tools[0].function.name`."""
    tools = []
    for index, item in enumerate(_array(value, "tools", MAX_TOOLS)):
        path = f"tools[{index}]"
        fields = without_nulls(item, path, param=path)
        _check_type(fields, path)
        refuse_unknown(fields, ("type", "function"), prefix=f"{path}.")
        tools.append(_function(fields.get("function"), f"{path}.function"))
    return _with_unique_names(tools, "tools[{}].function.name")


def parse_functions(value: object) -> tuple[Tool, ...]:
    """Returns the tools of the older field `functions`. Raises RowError."""
    functions = _array(value, "functions", MAX_TOOLS)
    tools = [_function(item, f"functions[{index}]") for index, item in enumerate(functions)]
    return _with_unique_names(tools, "functions[{}].name")


def parse_arguments(arguments: str, path: str = "arguments") -> dict[str, Any]:
    """Returns the arguments of a call. Raises RowError if they are not the text of a JSON object."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        parsed = json.loads(arguments, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise RowError(
            f"{path} must be a JSON object written as a string: {error or 'nested too deeply'}", param=path
        ) from error
    if not isinstance(parsed, dict):
        raise RowError(
            f"{path} must be a JSON object written as a string, not {json_type(parsed)}", param=path
        )
    check_json(parsed, path)
    return parsed


def _function(value: object, path: str) -> Tool:
    fields = without_nulls(value, path, param=path)
    refuse_unknown(fields, _FUNCTION_FIELDS, prefix=f"{path}.")
    name = _name(fields.get("name"), f"{path}.name")
    description = fields.get("description")
    boolean(fields, "strict", default=False, path=f"{path}.strict")
    parameters = fields.get("parameters", {"type": "object", "properties": {}})
    if not isinstance(parameters, dict):
        raise RowError(
            f"{path}.parameters must be a JSON schema, an object, not {json_type(parameters)}",
            param=f"{path}.parameters",
        )
    if parameters.get("type", "object") != "object":
        raise RowError(
            f"{path}.parameters.type must be 'object': arguments are passed by name",
            param=f"{path}.parameters.type",
        )
    check_json(parameters, f"{path}.parameters")
    return Tool(
        name=name,
        description=None if description is None else text(description, f"{path}.description", empty=True),
        parameters=parameters,
    )


def _with_unique_names(tools: Sequence[Tool], path: str) -> tuple[Tool, ...]:
    names: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in names:
            param = path.format(index)
            raise RowError(f"{param} {tool.name!r} is the name of an earlier tool", param=param)
        names.add(tool.name)
    return tuple(tools)


def _name(value: object, path: str) -> str:
    name = text(value, path)
    if _NAME.fullmatch(name) is None:
        raise RowError(
            f"{path} must have 1 to 64 characters, letters, digits, underscores or dashes", param=path
        )
    return name


def _check_type(fields: Mapping[str, object], path: str) -> None:
    if fields.get("type", "function") != "function":
        raise RowError(
            f"{path}.type is {fields['type']!r}; only 'function' is supported", param=f"{path}.type"
        )


def _array(value: object, path: str, limit: int | None = None) -> list[object]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowError(f"{path} must be an array, not {json_type(value)}", param=path)
    if limit is not None and len(value) > limit:
        raise RowError(f"{path} has {len(value)} items; at most {limit} are allowed", param=path)
    return value
