"""Tool calls of Llama 3.1 and later: the answer is one JSON object with name and parameters."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from heft_engine.data.tool_calls.format import (
    AnswerPart,
    Grammar,
    ToolCallFormat,
    call_of,
    literal,
)
from heft_engine.data.tool_calls.json_source import read_call, value_at
from heft_engine.data.tool_rows import Tool


class Llama3Format(ToolCallFormat):
    """An answer that begins with an object is a call; `<|python_tag|>` may stand before it. There is never a second."""

    name = "llama3_json"
    begins = ("<|python_tag|>", "{")
    only_first = True
    no_call = re.compile(r"(<\|python_tag\|>)?(\s{64}|\s{0,63}(\{\s{64}|\{\s{0,63}[^\s\"]|[^\s{<]))")

    def parse(self, text: str, tools: Collection[str]) -> tuple[list[AnswerPart], int]:
        start = len("<|python_tag|>") if text.startswith("<|python_tag|>") else 0
        _, source, length = value_at(text, start)
        call, _ = read_call(source, tools, arguments="parameters")
        return [call], length

    def grammar(self, tools: Sequence[Tool], *, parallel: bool) -> Grammar:
        return call_of(tools, '{"name": ', ', "parameters": ', literal("}"))
