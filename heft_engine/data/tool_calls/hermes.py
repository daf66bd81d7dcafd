"""Tool calls of Hermes and Qwen: `<tool_call>`, a JSON object with name and arguments, `</tool_call>`."""

from __future__ import annotations

import json

from heft_engine.data.tool_calls.format import CallTag, ToolCallFormat, json_value, make_call
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

    def tag(self, tool: Tool) -> CallTag:
        begin = f'<tool_call>\n{{"name": {json.dumps(tool.name)}, "arguments": '
        return CallTag(begin=begin, schema=dict(tool.parameters), end="}\n</tool_call>")
