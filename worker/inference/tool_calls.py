"""Tool calls in the answers to a request: how they are parsed, and the grammar of an answer that must be one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from heft_engine.data.chat_template import ChatTemplate
from heft_engine.data.tool_calls.format import AnswerParser, ToolCallFormat
from heft_engine.data.tool_calls.registry import FORMATS
from heft_engine.data.tool_rows import Tool, parse_tools
from heft_engine.errors import RowError
from heft_engine.inference.grammar import MAX_WHITESPACE, Constraint
from heft_engine.json_schema.arguments_schema import arguments_schema
from heft_engine.json_schema.schema_error import SchemaError
from heft_engine.json_schema.schema_limits import SchemaSize
from store.messages import generate as messages
from store.messages.generate import GenerateMessage


@dataclass(frozen=True, kw_only=True)
class AnswerTools:
    """The tools that answers may call. `constraint`: of answers that must call one, or else be of a given form."""

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
        answer = message.get("constraint")
        constraint = None
        if use["choice"] == "required":
            callable_tools = [tool for tool in tools if use["name"] in (None, tool.name)]
            constraint = _call(format, callable_tools, use["parallel"])
        elif answer is not None:
            constraint = _call(format, tools, use["parallel"], instead=answer)
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


def _call(
    format: ToolCallFormat,
    tools: Sequence[Tool],
    parallel: bool,
    *,
    instead: messages.Constraint | None = None,
) -> Constraint:
    """Returns the grammar of an answer that calls one of the tools, or is JSON of the schema `instead`.

    Raises RowError for a tool whose schema no grammar holds, and for tools that are too large together.
    """
    exact, size = [], SchemaSize()
    for index, tool in enumerate(tools):
        try:
            exact.append(replace(tool, parameters=arguments_schema(tool.parameters, size=size)))
        except SchemaError as error:
            path = "".join(f".{step}" for step in error.path)
            raise RowError(error.reason, param=f"tools[{index}].function.parameters{path}") from error
    grammar = format.grammar(exact, parallel=parallel)
    if instead is not None:
        schema = {"type": "json_schema", "json_schema": json.loads(instead["source"])}
        answer = {**schema, "max_whitespace_cnt": MAX_WHITESPACE}
        grammar = {"type": "or", "elements": [answer, grammar]}
    source = json.dumps({"type": "structural_tag", "format": grammar})
    return Constraint(kind="structural_tag", source=source, param="tools")
