"""Tool calls in the answers to a request: how they are parsed, and the grammar of an answer that must be one."""

from __future__ import annotations

import json
from dataclasses import dataclass

from heft_engine.data.chat_template import ChatTemplate
from heft_engine.data.tool_calls.format import AnswerParser, ToolCallFormat
from heft_engine.data.tool_calls.registry import FORMATS
from heft_engine.data.tool_rows import Tool, parse_tools
from heft_engine.errors import RowError
from heft_engine.inference.grammar import Constraint
from store.messages.generate import GenerateMessage


@dataclass(frozen=True, kw_only=True)
class AnswerTools:
    """The tools that answers may call. `constraint`: of answers that must call one."""

    format: ToolCallFormat
    tools: tuple[Tool, ...]
    parallel: bool
    visible_tokens: frozenset[int]
    constraint: Constraint | None

    @classmethod
    def of(cls, chat: ChatTemplate, message: GenerateMessage) -> AnswerTools | None:
        """Returns the tools of a chat request, None if there are none.

        Raises RowError for a template that writes calls in an unknown format.
        """
        use = message.get("tool_use")
        if use is None:
            return None
        format = chat.tool_calls
        if format is None:
            known = ", ".join(known.name for known in FORMATS)
            raise RowError(
                f"the model's chat template writes tool calls in a format that is not known here ({known}): "
                "leave tools out",
                param="tools",
            )
        tools = parse_tools(message["inputs"][0].get("tools"))
        constraint = None
        if use["choice"] == "required":
            callable_tools = [tool for tool in tools if use["name"] in (None, tool.name)]
            grammar = format.grammar(callable_tools, parallel=use["parallel"])
            source = json.dumps({"type": "structural_tag", "format": grammar})
            constraint = Constraint(kind="structural_tag", source=source, param="tools")
        return cls(
            format=format,
            tools=tools,
            parallel=use["parallel"],
            visible_tokens=chat.call_tokens,
            constraint=constraint,
        )

    def parser(self) -> AnswerParser:
        """Returns the parser of one answer."""
        return AnswerParser(self.format, {tool.name for tool in self.tools}, parallel=self.parallel)
