"""The known formats of tool calls. A model's is the one that reads what its chat template writes."""

from __future__ import annotations

from typing import Any

from heft_engine.data.tool_calls.format import AnswerParser, ToolCallFormat
from heft_engine.data.tool_calls.hermes import HermesFormat
from heft_engine.data.tool_calls.llama3 import Llama3Format
from heft_engine.data.tool_calls.mistral import MistralFormat
from heft_engine.data.tool_rows import ToolCall, parse_arguments

FORMATS: tuple[ToolCallFormat, ...] = (HermesFormat(), MistralFormat(), Llama3Format())


def format_of(answer: str, call: ToolCall) -> ToolCallFormat | None:
    """Returns the format that reads nothing but `call` in an answer, or None."""
    for format in FORMATS:
        parser = AnswerParser(format, {call.name})
        parts = parser.push(answer) + parser.flush()
        if len(parts) == 1 and isinstance(parts[0], ToolCall) and _says(parts[0]) == _says(call):
            return format
    return None


def _says(call: ToolCall) -> tuple[str, dict[str, Any]]:
    """Returns what two calls have in common that differ in their ids and in how they are written."""
    return call.name, parse_arguments(call.arguments)
