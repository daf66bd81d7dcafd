"""The interface of a format of tool calls, and the parser of a streamed answer that may contain them."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from heft_engine.data.tool_calls.json_source import UnterminatedString
from heft_engine.data.tool_rows import Tool, ToolCall

#: What an answer consists of: pieces of its content, and complete tool calls.
AnswerPart = str | ToolCall
#: A format of xgrammar's structural tags, as JSON.
Grammar = dict[str, Any]
#: White space between two parts of the arguments at most: small models write blanks for ever where they may.
_MAX_WHITESPACE = 1
#: Ends at which a call is parsed before it is left to the end of the answer: each parses the call from its beginning.
_MAX_ATTEMPTS = 16


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

    #: Matches the beginning of a text that is no call, whatever follows: no JSON, or 64 blanks before it.
    no_call: ClassVar[re.Pattern[str]]

    @abstractmethod
    def parse(self, text: str, tools: Collection[str]) -> tuple[list[AnswerPart], int]:
        """Returns the calls with which a text begins, and their length, with the begin and without the end.

        The text begins with one of `begins`. In a list, a call of a function that is none of `tools` is returned as it
        is written. Raises ValueError for a text that does not begin with a call of one of `tools`.
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
        self._searched = 0  #: characters of the call in which no end begins that has not been tried
        self._attempts = 0  #: to parse the call
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
        return self._take_parts(is_whole=False)

    def flush(self) -> list[AnswerPart]:
        """Returns the rest, at the end of the answer."""
        parts = self._take_parts(is_whole=True)
        if self.is_complete:
            return parts
        rest, self._pending = self._pending, ""
        parts += self._content(rest)
        if self._spaces and not self.calls:
            parts.append(self._spaces)
        return parts

    def _take_parts(self, *, is_whole: bool) -> list[AnswerPart]:
        """Returns the parts that are certain, all but the beginning of a call where the answer `is_whole`."""
        parts: list[AnswerPart] = []
        while not self.is_complete:
            certain = self._take_call(is_whole=is_whole) if self._is_in_call else self._take_content()
            if certain is None:
                break
            parts += certain
        return parts

    def _take_content(self) -> list[AnswerPart] | None:
        """Returns the content before the next call, which it enters, or None if there is no more for now."""
        begins = self._format.begins
        if self._format.only_first and (self._has_content or self.calls):
            begins = ()
        start = min((at for at in map(self._pending.find, begins) if at >= 0), default=-1)
        if self._format.only_first and start >= 0 and self._pending[:start].strip():
            start = -1
        if start >= 0:
            content, self._pending = self._pending[:start], self._pending[start:]
            self._is_in_call = True
            self._searched = self._attempts = 0
            return self._content(content)
        certain = len(self._pending) - _partial_match(self._pending, begins)
        content, self._pending = self._pending[:certain], self._pending[certain:]
        return self._content(content) or None

    def _take_call(self, *, is_whole: bool) -> list[AnswerPart] | None:
        """Returns the call if it is complete, its begin as content if it is none, or None if more text may follow."""
        if self._format.no_call.match(self._pending):
            return self._refuse_call()
        text = self._pending if is_whole else self._up_to_end()
        if text is None:
            return None
        try:
            parts, length = self._format.parse(text, self._tools)
        except UnterminatedString:
            # The end may be a part of a string in the arguments.
            return self._refuse_call() if is_whole else None
        except ValueError:
            return self._refuse_call()
        rest = self._pending[length:]
        if end := self._format.end:
            rest = rest.lstrip()
            # The answer may stop before the end, or within it.
            if not rest.startswith(end) and not (is_whole and end.startswith(rest)):
                return self._refuse_call()
            rest = rest[len(end) :]
        self._pending = rest
        self._is_in_call = False
        return self._called(parts)

    def _up_to_end(self) -> str | None:
        """Returns the call's text up to the last end in it, or None if there has been none since the last attempt."""
        end = self._format.end
        if end is None or self._attempts == _MAX_ATTEMPTS:
            return None
        at = self._pending.rfind(end, self._searched)
        self._searched = max(len(self._pending) - len(end) + 1, 0)
        if at < 0:
            return None
        self._attempts += 1
        return self._pending[: at + len(end)]

    def _refuse_call(self) -> list[AnswerPart]:
        """Leaves a call that is none. Returns its begin as content: calls may follow, also before its end."""
        begin = next(begin for begin in self._format.begins if self._pending.startswith(begin))
        self._pending = self._pending.removeprefix(begin)
        self._is_in_call = False
        return self._content(begin)

    def _called(self, parts: Sequence[AnswerPart]) -> list[AnswerPart]:
        """Returns calls and the content between them, up to the first call if only one is allowed."""
        allowed: list[AnswerPart] = []
        for part in parts:
            if self.is_complete:
                break
            if isinstance(part, ToolCall):
                self.calls += 1
                allowed.append(part)
            else:
                allowed += self._content(part)
        return allowed

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
