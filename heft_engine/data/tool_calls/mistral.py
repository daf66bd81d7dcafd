"""Tool calls of Mistral since v3: `[TOOL_CALLS]` and a JSON array of objects with name, arguments and id."""

from __future__ import annotations

from collections.abc import Sequence

from heft_engine.data.tool_calls.format import (
    Grammar,
    ToolCallFormat,
    call_of,
    json_value,
    list_of,
    literal,
    make_call,
    sequence,
    short_id,
)
from heft_engine.data.tool_rows import Tool, ToolCall


class MistralFormat(ToolCallFormat):
    """Ids have nine letters and digits; a client gets them with `call_` before them."""

    name = "mistral"
    begins = ("[TOOL_CALLS]",)

    def parse(self, text: str) -> list[ToolCall]:
        calls = json_value(text.removeprefix("[TOOL_CALLS]"))
        if not isinstance(calls, list) or not calls or not all(isinstance(call, dict) for call in calls):
            raise ValueError("calls are an array of objects")
        return [make_call(call.get("name"), call.get("arguments"), _id(call.get("id"))) for call in calls]

    def grammar(self, tools: Sequence[Tool], *, parallel: bool) -> Grammar:
        # Templates differ in the blank before the array and in whether they write ids.
        end = {"type": "regex", "pattern": r'(, "id": "[a-zA-Z0-9]{9}")?\}'}
        call = call_of(tools, '{"name": ', ', "arguments": ', end)
        return sequence(
            {"type": "token", "token": "[TOOL_CALLS]"},
            {"type": "regex", "pattern": r" ?\["},
            list_of(call, ", ") if parallel else call,
            literal("]"),
        )

    def template_id(self, call_id: str) -> str:
        return short_id(call_id)


def _id(value: object) -> str | None:
    return value if isinstance(value, str) and short_id(value) == value else None
