"""Chat rows in OpenAI's fine-tuning format: `{"messages": […], "tools": […], "parallel_tool_calls": …}`.

The older `functions`, `function_call` and role `function` are read as tools, tool calls and tool messages. Fields that
these models can't use (images, documents) are refused by name, not dropped: an error is better than a model trained on
half of a conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from heft_engine.data.row_fields import boolean, json_type, refuse_unknown, text, without_nulls
from heft_engine.data.tool_rows import ConversationCalls, Tool, ToolCall, parse_functions, parse_tools
from heft_engine.errors import RowError

_ROW_FIELDS = ("messages", "tools", "functions", "parallel_tool_calls")
_UNSUPPORTED_IN_ROW = {
    "documents": "put the documents' text into a message",
    "function_call": "it belongs to an assistant message",
    "tool_choice": "it belongs to requests; a row shows the calls themselves",
}
_MESSAGE_FIELDS = ("role", "content", "name", "weight")
_UNSUPPORTED_IN_MESSAGE = {
    "refusal": "write the refusal as the assistant's content",
    "audio": "these models read text only",
}
#: Lists that OpenAI's package writes into assistant messages, accepted while they are empty.
_EMPTY_LISTS = ("annotations", "tool_calls")
#: `developer` is the newer name of the system turn and `function` the older one of the tool's; templates know neither.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_FIELDS_OF_ROLE = {
    "assistant": ("tool_calls", "function_call", "reasoning_content"),
    "tool": ("tool_call_id",),
}


@dataclass(frozen=True, kw_only=True)
class Message:
    """A turn of a conversation. An assistant turn with `weight` 0 is not supervised, as in OpenAI's API."""

    role: str
    content: str
    weight: int = 1
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None  #: of a tool message: the call whose result it has

    @property
    def is_supervised(self) -> bool:
        return self.role == "assistant" and bool(self.weight)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """The turns of a chat row and the tools that its assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()


def parse_conversation(fields: dict[str, object], *, need_answer: bool) -> Conversation:
    """Returns a chat row. Raises RowError with the field at fault, such as `messages[2].content`.

    With `need_answer` it is a row to train on: a turn that is not the first must be a supervised assistant turn, every
    called function must be in `tools`, and no content may be missing. The first turn is never supervised: there is
    nothing that it answers. Without `need_answer` it is a conversation whose next turn is asked for.
    """
    refuse_unknown(fields, _ROW_FIELDS, why=_UNSUPPORTED_IN_ROW)
    if "tools" in fields and "functions" in fields:
        raise RowError("set tools or functions, the older name, not both", param="functions")
    tools = (
        parse_functions(fields["functions"]) if "functions" in fields else parse_tools(fields.get("tools"))
    )
    messages = _messages(fields.get("messages"), tools, need_answer=need_answer)
    if not boolean(fields, "parallel_tool_calls", default=True):
        _refuse_parallel_calls(messages)
    if need_answer:
        if messages[0].is_supervised:
            messages = (replace(messages[0], weight=0), *messages[1:])
        if not any(message.is_supervised for message in messages):
            raise RowError(
                "messages must have an assistant turn with weight 1 after the first turn, to train on",
                param="messages",
            )
    return Conversation(messages=messages, tools=tools)


def _messages(turns: object, tools: Sequence[Tool], *, need_answer: bool) -> tuple[Message, ...]:
    if not isinstance(turns, list):
        raise RowError(f"messages must be an array, not {json_type(turns)}", param="messages")
    if not turns:
        raise RowError("messages is empty", param="messages")
    calls = ConversationCalls(offered={tool.name for tool in tools} if need_answer else None)
    return tuple(
        _message(turn, f"messages[{index}]", calls, need_content=need_answer)
        for index, turn in enumerate(turns)
    )


def _message(turn: object, path: str, calls: ConversationCalls, *, need_content: bool) -> Message:
    fields = without_nulls(turn, path, param=path)
    fields = {key: value for key, value in fields.items() if key not in _EMPTY_LISTS or value != []}
    role = fields.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        shown = "missing" if role is None else f"{role!r}"
        raise RowError(f"{path}.role is {shown}; it must be one of {', '.join(_ROLES)}", param=f"{path}.role")
    allowed = (*_MESSAGE_FIELDS, *_FIELDS_OF_ROLE.get(_ROLES[role], ()))
    refuse_unknown(fields, allowed, why=_UNSUPPORTED_IN_MESSAGE, prefix=f"{path}.")
    name = text(fields["name"], f"{path}.name") if "name" in fields else None
    tool_calls = calls.of_message(fields, path)
    tool_call_id = None
    if role == "tool":
        tool_call_id = calls.result_of(fields.get("tool_call_id"), f"{path}.tool_call_id")
    elif role == "function":
        tool_call_id = calls.result_of_function(name, f"{path}.name")
    may_be_empty = not need_content or bool(tool_calls) or _ROLES[role] in ("system", "tool")
    reasoning = fields.get("reasoning_content")
    return Message(
        role=_ROLES[role],
        content=_content(
            fields, f"{path}.content", empty=may_be_empty, required=not tool_calls and need_content
        ),
        weight=_weight(fields, role, path),
        name=name or calls.function_of(tool_call_id),
        reasoning_content=None if reasoning is None else text(reasoning, f"{path}.reasoning_content"),
        tool_calls=tool_calls,
        tool_call_id=tool_call_id,
    )


def _content(fields: dict[str, object], path: str, *, empty: bool, required: bool) -> str:
    """Returns a string, or the joined text parts of an array."""
    value = fields.get("content")
    if value is None and not required:
        return ""
    if not isinstance(value, list):
        return text(value, path, empty=empty)
    parts = []
    for index, item in enumerate(value):
        part_path = f"{path}[{index}]"
        part = without_nulls(item, part_path, param=part_path)
        if part.get("type") != "text":
            message = f"{part_path} has type {part.get('type')!r}; only text is supported"
            raise RowError(message, param=part_path)
        refuse_unknown(part, ("type", "text"), prefix=f"{part_path}.")
        parts.append(text(part.get("text"), f"{part_path}.text", empty=True))
    return text("".join(parts), path, empty=empty)


def _weight(fields: dict[str, object], role: str, path: str) -> int:
    weight = fields.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"{path}.weight must be 0 or 1", param=f"{path}.weight")
    if "weight" in fields and role != "assistant":
        raise RowError(f"{path}.weight is allowed in assistant turns only", param=f"{path}.weight")
    return 1 if weight else 0


def _refuse_parallel_calls(messages: Sequence[Message]) -> None:
    for index, message in enumerate(messages):
        if len(message.tool_calls) > 1:
            path = f"messages[{index}].tool_calls"
            raise RowError(
                f"{path} has {len(message.tool_calls)} calls, but parallel_tool_calls is false: "
                "write one call in each message",
                param=path,
            )
