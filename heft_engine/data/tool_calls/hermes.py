"""Tool calls of Hermes and Qwen: `<tool_call>`, a JSON object with name and arguments, `</tool_call>`."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from heft_engine.data.tool_calls.format import (
    AnswerPart,
    Grammar,
    ToolCallFormat,
    call_of,
    list_of,
    literal,
)
from heft_engine.data.tool_calls.json_source import read_call, value_at
from heft_engine.data.tool_rows import Tool


class HermesFormat(ToolCallFormat):
    name = "hermes"
    begins = ("<tool_call>",)
    end = "</tool_call>"
    no_call = re.compile(r"<tool_call>(\s{0,63}[^\s{]|\s{64})")

    def parse(self, text: str, tools: Collection[str]) -> tuple[list[AnswerPart], int]:
        _, source, length = value_at(text, len("<tool_call>"))
        call, _ = read_call(source, tools)
        return [call], length

    def grammar(self, tools: Sequence[Tool], *, parallel: bool) -> Grammar:
        call = call_of(tools, '<tool_call>\n{"name": ', ', "arguments": ', literal("}\n</tool_call>"))
        return list_of(call, "\n") if parallel else call
