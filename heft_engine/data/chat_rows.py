"""Chat rows in OpenAI's format: `{"messages": [{"role", "content"}, …]}`.

Fields that these models can't use (tools, images, names) are refused by name, not dropped: an error is better than a
model trained on half of a conversation.
"""

from __future__ import annotations

from dataclasses import dataclass

from heft_engine.data.row_fields import json_type, refuse_unknown, text, without_nulls
from heft_engine.errors import RowError

_NO_TOOLS = "training on tool and function calls is not supported"
_UNSUPPORTED_IN_ROW = {
    "tools": _NO_TOOLS,
    "functions": _NO_TOOLS,
    "parallel_tool_calls": _NO_TOOLS,
    "documents": "put the documents' text into a message",
}
_UNSUPPORTED_IN_MESSAGE = {
    "name": "chat templates ignore it; put the name into the content",
    "tool_calls": _NO_TOOLS,
    "tool_call_id": _NO_TOOLS,
    "function_call": _NO_TOOLS,
    "refusal": "write the refusal as the assistant's content",
    "audio": "these models read text only",
}
#: `developer` is the newer name of the system turn; chat templates know only the older one.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, kw_only=True)
class Message:
    """A turn of a conversation. An assistant turn with `weight` 0 is not supervised, as in OpenAI's API."""

    role: str
    content: str
    weight: int = 1


def parse_messages(fields: dict[str, object], *, need_answer: bool) -> tuple[Message, ...]:
    """Returns the turns of a chat row. Raises RowError with the field at fault, such as `messages[2].content`.

    With `need_answer`, at least one assistant turn must be supervised; without, the last turn must not be the
    assistant's.
    """
    refuse_unknown(fields, ("messages",), why=_UNSUPPORTED_IN_ROW)
    turns = fields.get("messages")
    if not isinstance(turns, list):
        raise RowError(f"messages must be an array, not {json_type(turns)}", param="messages")
    if not turns:
        raise RowError("messages is empty", param="messages")
    messages = tuple(_message(turn, f"messages[{index}]") for index, turn in enumerate(turns))
    if need_answer:
        if not any(message.role == "assistant" and message.weight for message in messages):
            raise RowError("messages must have an assistant turn with weight 1 to train on", param="messages")
        if messages[0].role == "assistant" and messages[0].weight:
            raise RowError("the first turn must not be a supervised assistant turn", param="messages[0]")
    elif messages[-1].role == "assistant":
        raise RowError(
            "the last turn must not be the assistant's: there is nothing to answer", param="messages"
        )
    return messages


def _message(turn: object, path: str) -> Message:
    fields = without_nulls(turn, path, param=path)
    role = fields.get("role")
    if role in ("tool", "function"):
        raise RowError(f"{path}.role {role!r} is not supported: {_NO_TOOLS}", param=f"{path}.role")
    refuse_unknown(fields, ("role", "content", "weight"), why=_UNSUPPORTED_IN_MESSAGE, prefix=f"{path}.")
    if not isinstance(role, str) or role not in _ROLES:
        shown = "missing" if role is None else f"{role!r}"
        raise RowError(f"{path}.role is {shown}; it must be one of {', '.join(_ROLES)}", param=f"{path}.role")
    content = _content(fields.get("content"), f"{path}.content", empty=_ROLES[role] == "system")
    return Message(role=_ROLES[role], content=content, weight=_weight(fields, role, path))


def _content(value: object, path: str, *, empty: bool) -> str:
    """Returns a string, or the joined text parts of an array."""
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
