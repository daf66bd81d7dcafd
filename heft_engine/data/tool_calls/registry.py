"""The known formats of tool calls. A model's is the one that reads what its chat template writes."""

from __future__ import annotations

from heft_engine.data.tool_calls.format import AnswerParser, ToolCallFormat
from heft_engine.data.tool_calls.hermes import HermesFormat
from heft_engine.data.tool_calls.llama3 import Llama3Format
from heft_engine.data.tool_calls.mistral import MistralFormat
from heft_engine.data.tool_rows import ToolCall

FORMATS: tuple[ToolCallFormat, ...] = (HermesFormat(), MistralFormat(), Llama3Format())


def format_of(answer: str, call: ToolCall) -> ToolCallFormat | None:
    """Returns the format that reads nothing but `call` in an answer, or None."""
    for format in FORMATS:
        parser = AnswerParser(format, {call.name})
        parts = parser.push(answer) + parser.flush()
        calls = [(part.name, part.arguments) for part in parts if isinstance(part, ToolCall)]
        if len(parts) == 1 and calls == [(call.name, call.arguments)]:
            return format
    return None
