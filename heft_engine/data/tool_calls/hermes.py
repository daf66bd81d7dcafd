"""Tool calls of Hermes and Qwen: `<tool_call>`, a JSON object with name and arguments, `</tool_call>`."""

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
)
from heft_engine.data.tool_rows import Tool, ToolCall


class HermesFormat(ToolCallFormat):
    name = "hermes"
    begins = ("<tool_call>",)
    end = "</tool_call>"

    def parse(self, text: str) -> list[ToolCall]:
        call = json_value(text.removeprefix("<tool_call>"))
        if not isinstance(call, dict):
            raise ValueError("a call is an object")
        return [make_call(call.get("name"), call.get("arguments"))]

    def grammar(self, tools: Sequence[Tool], *, parallel: bool) -> Grammar:
        call = call_of(tools, '<tool_call>\n{"name": ', ', "arguments": ', literal("}\n</tool_call>"))
        return list_of(call, "\n") if parallel else call
