"""The interface of a format of tool calls, and the parser of a streamed answer that may contain them."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from heft_engine.data.tool_rows import Tool, ToolCall, parse_arguments
from heft_engine.errors import RowError

#: What an answer consists of: pieces of its content, and complete tool calls.
AnswerPart = str | ToolCall
#: A format of xgrammar's structural tags, as JSON.
Grammar = dict[str, Any]
#: White space between two parts of the arguments at most: small models write blanks for ever where they may.
_MAX_WHITESPACE = 1


class ToolCallFormat(ABC):
    """A family's way to write tool calls. The chat template writes them; this reads them back."""

    #: The format's name, as in vLLM's `--tool-call-parser`.
    name: ClassVar[str]
    #: Texts with which a call begins. They may be special tokens, which are hidden from other texts.
    begins: ClassVar[tuple[str, ...]]
    #: The text with which a call ends; None where all calls are written as one, up to the end of the answer.
    end: ClassVar[str | None] = None
    #: True if calls stand at the beginning of an answer or nowhere.
    only_first: ClassVar[bool] = False

    @abstractmethod
    def parse(self, text: str) -> list[ToolCall]:
        """Returns the calls in a text that begins with one of `begins`, and stands before `end`.

        Raises ValueError for a text that is no call. Ids that the format does not write are new.
        """

    @abstractmethod
    def grammar(self, tools: Sequence[Tool], *, parallel: bool) -> Grammar:
        """Returns the grammar of an answer that calls at least one of the tools, and with `parallel` several."""

    def template_id(self, call_id: str) -> str:
        """Returns the id that the chat template is given for a call."""
        return call_id


class AnswerParser:
    """Divides a streamed answer into content and tool calls. Text that is no call of an offered tool stays content.

    A call is returned when it is complete, so that its arguments always parse. White space between content and calls
    is left out. With `parallel` false, nothing follows the first call.
    """

    def __init__(self, format: ToolCallFormat, tools: Collection[str], *, parallel: bool = True) -> None:
        self._format = format
        self._tools = tools
        self._parallel = parallel
        self._pending = ""  #: text that may be, or is, the beginning of a call
        self._is_in_call = False
        self._has_content = False
        self._spaces = ""  #: white space that is content only if content follows
        self.calls = 0

    @property
    def is_complete(self) -> bool:
        """Returns True if the answer has ended, because only one call is allowed."""
        return self.calls > 0 and not self._parallel

    def push(self, text: str) -> list[AnswerPart]:
        """Returns the parts that have become certain with `text`."""
        self._pending += text
        parts: list[AnswerPart] = []
        while not self.is_complete:
            certain = self._take_call() if self._is_in_call else self._take_content()
            if certain is None:
                break
            parts += certain
        return parts

    def flush(self) -> list[AnswerPart]:
        """Returns the rest, at the end of the answer."""
        if self.is_complete:
            return []
        rest, self._pending = self._pending, ""
        if self._is_in_call:
            self._is_in_call = False
            if calls := self._calls(rest):
                return [*calls]
        parts = self._content(rest)
        if self._spaces and not self.calls:
            parts.append(self._spaces)
        return parts

    def _take_content(self) -> list[AnswerPart] | None:
        """Returns the content before the next call, which it enters, or None if there is no more for now."""
        begins = self._format.begins
        if self._format.only_first and self._has_content:
            begins = ()
        start = min((at for at in map(self._pending.find, begins) if at >= 0), default=-1)
        if self._format.only_first and start >= 0 and self._pending[:start].strip():
            start = -1
        if start >= 0:
            content, self._pending = self._pending[:start], self._pending[start:]
            self._is_in_call = True
            return self._content(content)
        certain = len(self._pending) - _partial_match(self._pending, begins)
        content, self._pending = self._pending[:certain], self._pending[certain:]
        return self._content(content) or None

    def _take_call(self) -> list[AnswerPart] | None:
        """Returns the call that has been completed, or None."""
        if self._format.end is None:
            return None
        end = self._format.end
        at = self._pending.find(end)
        while at >= 0:
            if calls := self._calls(self._pending[:at]):
                self._pending = self._pending[at + len(end) :]
                self._is_in_call = False
                return [*calls]
            # The end may be a part of a string in the arguments.
            at = self._pending.find(end, at + 1)
        return None

    def _calls(self, text: str) -> list[ToolCall]:
        """Returns the calls of a text, or none if it is not made of calls of offered tools."""
        try:
            calls = self._format.parse(text)
        except ValueError:
            return []
        if not all(call.name in self._tools for call in calls):
            return []
        calls = calls if self._parallel else calls[:1]
        self.calls += len(calls)
        return calls

    def _content(self, text: str) -> list[AnswerPart]:
        """Returns text without the white space at its end, which waits for what follows."""
        text = self._spaces + text
        content = text.rstrip()
        self._spaces = text[len(content) :]
        if not content:
            return []
        self._has_content = True
        return [content]


def literal(value: str) -> Grammar:
    """Returns the grammar of one text."""
    return {"type": "const_string", "value": value}


def sequence(*parts: Grammar) -> Grammar:
    """Returns the grammar of its parts, one after another."""
    return {"type": "sequence", "elements": list(parts)}


def call_of(tools: Sequence[Tool], begin: str, between: str, end: Grammar) -> Grammar:
    """Returns the grammar of a call of one of the tools: `begin`, name, `between`, arguments, `end`."""
    calls = [
        sequence(
            literal(begin + json.dumps(tool.name) + between),
            {
                "type": "json_schema",
                "json_schema": dict(tool.parameters),
                "max_whitespace_cnt": _MAX_WHITESPACE,
            },
            end,
        )
        for tool in tools
    ]
    return {"type": "or", "elements": calls} if len(calls) > 1 else calls[0]


def list_of(call: Grammar, separator: str) -> Grammar:
    """Returns the grammar of one call or several, with a separator between them."""
    return sequence(call, {"type": "star", "content": sequence(literal(separator), call)})


def make_call(name: object, arguments: object, call_id: str | None = None) -> ToolCall:
    """Returns a call of parsed JSON values. Raises ValueError if they are not a name and an object."""
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError("a call needs a name and an object of arguments")
    written = json.dumps(arguments, ensure_ascii=False)
    try:
        parse_arguments(written)
    except RowError as error:
        raise ValueError(error.message) from error
    return ToolCall(id=f"call_{call_id or secrets.token_hex(12)}", name=name, arguments=written)


def json_value(text: str) -> Any:
    """Returns a JSON value. Raises ValueError for other text."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error


def short_id(call_id: str) -> str:
    """Returns nine letters and digits for a call's id: its own, if it has that form, else a digest."""
    name = call_id.removeprefix("call_")
    if re.fullmatch("[a-zA-Z0-9]{9}", name):
        return name
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _partial_match(text: str, begins: Sequence[str]) -> int:
    """Returns the length of the longest end of `text` with which one of `begins` begins."""
    longest = max((len(begin) - 1 for begin in begins), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(begin.startswith(text[-length:]) for begin in begins):
            return length
    return 0
