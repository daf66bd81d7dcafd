"""Tool calls of Mistral since v3: `[TOOL_CALLS]` and a JSON array of objects with name, arguments and id."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace

from heft_engine.data.tool_calls.format import (
    AnswerPart,
    Grammar,
    ToolCallFormat,
    call_of,
    list_of,
    literal,
    sequence,
    short_id,
)
from heft_engine.data.tool_calls.json_source import parts_of, read_call, value_at
from heft_engine.data.tool_rows import Tool, ToolCall


class MistralFormat(ToolCallFormat):
    """Ids have nine letters and digits; a client gets them with `call_` before them."""

    name = "mistral"
    begins = ("[TOOL_CALLS]",)
    no_call = re.compile(r"\[TOOL_CALLS\](\s{0,63}[^\s\[]|\s{64})")

    def parse(self, text: str, tools: Collection[str]) -> tuple[list[AnswerPart], int]:
        calls, source, length = value_at(text, len("[TOOL_CALLS]"))
        if not isinstance(calls, list):
            raise ValueError("calls are an array")
        parts = [_call_or_text(item, tools) for item in parts_of(source)]
        if not any(isinstance(part, ToolCall) for part in parts):
            raise ValueError("no item is a call of one of the tools")
        return parts, length

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


def _call_or_text(item: str, tools: Collection[str]) -> AnswerPart:
    """Returns an item of the array as a call of one of the tools, or else as it is written."""
    try:
        call, call_id = read_call(item, tools)
    except ValueError:
        return item
    if isinstance(call_id, str) and short_id(call_id) == call_id:
        return replace(call, id=f"call_{call_id}")
    return call
