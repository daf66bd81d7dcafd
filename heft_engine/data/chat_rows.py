"""Chat rows as OpenAI's API has them: `{"messages": [{"role", "content"}, …]}`.

What has no meaning for the models here (tools, images, names) is refused by name rather than dropped: a model
that was trained on half of a conversation is worse than an error. It does NOT know chat templates.
"""

from __future__ import annotations

from dataclasses import dataclass

from heft_engine.data.row_fields import json_type, refuse_unknown, text, without_nulls
from heft_engine.errors import RowError

_NO_TOOLS = "tool and function calls can't be trained on"
_UNSUPPORTED_IN_ROW = {
    "tools": _NO_TOOLS,
    "functions": _NO_TOOLS,
    "parallel_tool_calls": _NO_TOOLS,
    "documents": "put what the model should read into a message",
}
_UNSUPPORTED_IN_MESSAGE = {
    "name": "it never reaches the model; put the name into the content if it matters",
    "tool_calls": _NO_TOOLS,
    "tool_call_id": _NO_TOOLS,
    "function_call": _NO_TOOLS,
    "refusal": "write the refusal as the assistant's content",
    "audio": "these models read text alone",
}
#: `developer` is what newer clients call the system's turn; chat templates know only the older name.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation. `weight` 0 leaves an assistant's turn unsupervised, as in OpenAI's API."""

    role: str
    content: str
    weight: int = 1


def parse_messages(fields: dict[str, object], *, need_answer: bool) -> tuple[Message, ...]:
    """The conversation of a chat row. Raises RowError naming the turn at fault, `messages[2].content`.

    With `need_answer` some assistant's turn must be supervised; without, the last turn must await an answer.
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
            raise RowError("no assistant turn to learn from (with weight 1)", param="messages")
        if messages[0].role == "assistant" and messages[0].weight:
            raise RowError(
                "the first turn is the assistant's: there is nothing it answers", param="messages[0]"
            )
    elif messages[-1].role == "assistant":
        raise RowError("the last turn is the assistant's: there is nothing left to answer", param="messages")
    return messages


def _message(turn: object, where: str) -> Message:
    fields = without_nulls(turn, where, param=where)
    role = fields.get("role")
    if role in ("tool", "function"):
        raise RowError(f"{where}.role {role!r} is not supported: {_NO_TOOLS}", param=f"{where}.role")
    refuse_unknown(fields, ("role", "content", "weight"), why=_UNSUPPORTED_IN_MESSAGE, prefix=f"{where}.")
    if not isinstance(role, str) or role not in _ROLES:
        wanted = ", ".join(_ROLES)
        found = "missing" if role is None else f"{role!r}"
        raise RowError(f"{where}.role is {found}; it must be one of {wanted}", param=f"{where}.role")
    content = _content(fields.get("content"), f"{where}.content", empty=_ROLES[role] == "system")
    return Message(role=_ROLES[role], content=content, weight=_weight(fields, role, where))


def _content(value: object, name: str, *, empty: bool) -> str:
    """A string, or an array of text parts, which are joined."""
    if not isinstance(value, list):
        return text(value, name, empty=empty)
    parts = []
    for index, item in enumerate(value):
        where = f"{name}[{index}]"
        part = without_nulls(item, where, param=where)
        if part.get("type") != "text":
            message = f"{where} is of type {part.get('type')!r}: only text can be trained on"
            raise RowError(message, param=where)
        refuse_unknown(part, ("type", "text"), prefix=f"{where}.")
        parts.append(text(part.get("text"), f"{where}.text", empty=True))
    return text("".join(parts), name, empty=empty)


def _weight(fields: dict[str, object], role: str, where: str) -> int:
    weight = fields.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"{where}.weight must be 0 or 1", param=f"{where}.weight")
    if "weight" in fields and role != "assistant":
        raise RowError(f"{where}.weight: only the assistant's turns have a weight", param=f"{where}.weight")
    return 1 if weight else 0
