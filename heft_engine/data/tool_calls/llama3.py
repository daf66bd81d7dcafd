"""Tool calls of Llama 3.1 and later: the answer is one JSON object with name and parameters."""

from __future__ import annotations

from collections.abc import Sequence

from heft_engine.data.tool_calls.format import (
    Grammar,
    ToolCallFormat,
    call_of,
    json_value,
    literal,
    make_call,
)
from heft_engine.data.tool_rows import Tool, ToolCall


class Llama3Format(ToolCallFormat):
    """An answer that begins with an object is a call; `<|python_tag|>` may stand before it. There is never a second."""

    name = "llama3_json"
    begins = ("<|python_tag|>", "{")
    only_first = True

    def parse(self, text: str) -> list[ToolCall]:
        call = json_value(text.removeprefix("<|python_tag|>"))
        if not isinstance(call, dict):
            raise ValueError("a call is an object")
        return [make_call(call.get("name"), call.get("parameters"))]

    def grammar(self, tools: Sequence[Tool], *, parallel: bool) -> Grammar:
        return call_of(tools, '{"name": ', ', "parameters": ', literal("}"))
