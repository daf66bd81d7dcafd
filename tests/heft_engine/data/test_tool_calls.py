"""Tool calls in generated text, however it is divided into pieces."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import pytest

from heft_engine.data.tool_calls.format import AnswerParser, AnswerPart, ToolCallFormat, short_id
from heft_engine.data.tool_calls.hermes import HermesFormat
from heft_engine.data.tool_calls.llama3 import Llama3Format
from heft_engine.data.tool_calls.mistral import MistralFormat
from heft_engine.data.tool_rows import ToolCall

HERMES, LLAMA3, MISTRAL = HermesFormat(), Llama3Format(), MistralFormat()
ROME = '{"name": "f", "arguments": {"city": "Rome"}}'


def parse(format: ToolCallFormat, text: str, size: int = 1_000, **settings: Any) -> tuple[str, list[Any]]:
    """Returns the content and the calls (name, arguments) of a text that comes in pieces of `size` characters."""
    parser = AnswerParser(format, {"f", "g"}, **settings)
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.flush()
    calls = [part for part in parts if isinstance(part, ToolCall)]
    assert all(isinstance(json.loads(call.arguments, parse_int=float), dict) for call in calls)
    assert len({call.id for call in calls}) == len(calls) == parser.calls
    assert all(call.id.startswith("call_") for call in calls)
    return "".join(part for part in parts if isinstance(part, str)), [
        (call.name, call.arguments) for call in calls
    ]


CALL = ("f", '{"city": "Rome"}')


@pytest.mark.parametrize("size", [1, 3, 1_000])
@pytest.mark.parametrize(
    ("format", "text", "content", "calls"),
    [
        (HERMES, f"<tool_call>\n{ROME}\n</tool_call>", "", [CALL]),
        (HERMES, f"I look.\n<tool_call>{ROME}</tool_call>\n", "I look.", [CALL]),
        (HERMES, f"<tool_call>\n{ROME}\n</tool_call>\n<tool_call>\n{ROME}\n</tool_call>", "", [CALL, CALL]),
        (HERMES, f"<tool_call>\n{ROME}", "", [CALL]),
        (HERMES, f"<tool_call>\n{ROME}\n</tool_", "", [CALL]),
        (
            HERMES,
            '<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}}</tool_call>',
            "",
            [("f", '{"x": "</tool_call>"}')],
        ),
        (LLAMA3, '{"name": "f", "parameters": {"city": "Rome"}}', "", [CALL]),
        (LLAMA3, '<|python_tag|>{"name": "f", "parameters": {"city": "Rome"}}', "", [CALL]),
        (MISTRAL, f"[TOOL_CALLS] [{ROME}]", "", [CALL]),
        (MISTRAL, f"[TOOL_CALLS][{ROME}, {ROME}]", "", [CALL, CALL]),
        (MISTRAL, f"Well. [TOOL_CALLS][{ROME}]", "Well.", [CALL]),
        # As they are written.
        *(
            (
                HERMES,
                f'<tool_call>{{"name": "f", "arguments" : {arguments} }}</tool_call>',
                "",
                [("f", arguments)],
            )
            for arguments in (
                '{"x":1e999, "y": -1E+400}',
                '{"x": %s}' % ("9" * 5_000),
                '{ "x":1.50,\n"x" : [1,{"y":"}, "}] }',
                '{"x": "\\ud83d\\ude00 \\\\ud800 \\u00e9"}',
            )
        ),
        (LLAMA3, '{"name": "f", "parameters": {"x": 1e999}}', "", [("f", '{"x": 1e999}')]),
        (MISTRAL, '[TOOL_CALLS][{"arguments": {"x":1e999}, "name": "f"}]', "", [("f", '{"x":1e999}')]),
        # No encoding can write a lone surrogate.
        (
            HERMES,
            '<tool_call>{"name": "f", "arguments": {"x": "\\ud800\\uD83D\\uDE00\\udc00"}}</tool_call>',
            "",
            [("f", '{"x": "\\ufffd\\uD83D\\uDE00\\ufffd"}')],
        ),
    ],
)
def test_calls_are_read(format: ToolCallFormat, text: str, content: str, calls: list[Any], size: int) -> None:
    assert parse(format, text, size) == (content, calls)


@pytest.mark.parametrize("size", [1, 3, 1_000])
@pytest.mark.parametrize(
    ("format", "text"),
    [
        (HERMES, "It is 3 < 4, <tool>, <tool_"),
        (HERMES, " two\n\nlines \n"),
        (HERMES, "   "),
        (HERMES, "<tool_call>\n{broken}\n</tool_call> and more"),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"city": "Ro'),
        (HERMES, '<tool_call>{"name": "f", "arguments": "Rome"}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
        (HERMES, "<tool_call>" + "[" * 10_000),
        (HERMES, "<tool_call>" + '{"a":' * 10_000),
        (HERMES, "<tool_call>" + " " * 100 + "x"),
        (HERMES, f"<tool_call>{ROME}, and more</tool_call>"),
        (HERMES, '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
        (LLAMA3, 'The answer: {"name": "f", "parameters": {}}'),
        (LLAMA3, '{"city": "Rome"}'),
        (LLAMA3, "{city}"),
        (LLAMA3, '<|python_tag|>print("{}")'),
        (MISTRAL, "[TOOL_CALLS] []"),
        (MISTRAL, "[TOOL_CALLS] [3]"),
        (MISTRAL, '[TOOL_CALLS] [{"name": "unknown", "arguments": {}}] and more'),
        (MISTRAL, "[TOOL_CALLS] nothing"),
    ],
)
def test_text_that_is_no_call_stays_content(format: ToolCallFormat, text: str, size: int) -> None:
    assert parse(format, text, size) == (text, [])


UNKNOWN = '{"name": "unknown", "arguments": {}}'


@pytest.mark.parametrize("size", [1, 3, 1_000])
@pytest.mark.parametrize(
    ("format", "text", "content"),
    [
        (
            HERMES,
            f"<tool_call>{UNKNOWN}</tool_call>\n<tool_call>{ROME}</tool_call>",
            f"<tool_call>{UNKNOWN}</tool_call>",
        ),
        (HERMES, f"Use <tool_call> tags. <tool_call>{ROME}</tool_call>", "Use <tool_call> tags."),
        (
            HERMES,
            f"<tool_call>{ROME[:-1]}</tool_call><tool_call>{ROME}</tool_call>",
            f"<tool_call>{ROME[:-1]}</tool_call>",
        ),
        (
            HERMES,
            f"<tool_call>{ROME[:-3]}</tool_call><tool_call>{ROME}</tool_call>",
            f"<tool_call>{ROME[:-3]}</tool_call>",
        ),
        (HERMES, f"<tool_call>{ROME} <tool_call>{ROME}</tool_call>", f"<tool_call>{ROME}"),
        (
            HERMES,
            f"<tool_call>{ROME}</tool_call> and <tool_call>{UNKNOWN}</tool_call>",
            f" and <tool_call>{UNKNOWN}</tool_call>",
        ),
        (HERMES, f"<tool_call>{ROME}</tool_call> and <tool_call>{ROME[:-1]}", f" and <tool_call>{ROME[:-1]}"),
        (LLAMA3, '{"name": "f", "parameters": {"city": "Rome"}}\nDone.', "\nDone."),
        (
            LLAMA3,
            '{"name": "f", "parameters": {"city": "Rome"}}; {"name": "f", "parameters": {}}',
            '; {"name": "f", "parameters": {}}',
        ),
        (MISTRAL, f"[TOOL_CALLS][{ROME}]\n and text", "\n and text"),
        (MISTRAL, f"[TOOL_CALLS][{UNKNOWN}, {ROME}, 3]", f"{UNKNOWN}3"),
        (MISTRAL, f"[TOOL_CALLS] nothing [TOOL_CALLS][{ROME}]", "[TOOL_CALLS] nothing"),
    ],
)
def test_calls_are_read_beside_text_that_is_none(
    format: ToolCallFormat, text: str, content: str, size: int
) -> None:
    assert parse(format, text, size) == (content, [CALL])


def test_what_is_no_call_is_not_held_back() -> None:
    parser = AnswerParser(HERMES, {"f"})
    assert "".join(map(str, parser.push("Use <tool_call> tags."))) == "Use <tool_call> tags."
    assert (
        "".join(map(str, parser.push(f"<tool_call>{UNKNOWN}</tool_call>")))
        == f"<tool_call>{UNKNOWN}</tool_call>"
    )
    (call,) = parser.push(f"\n<tool_call>{ROME}</tool_call>")
    assert isinstance(call, ToolCall)


class CountingFormat(HermesFormat):
    """Counts the characters that it is asked to parse."""

    def __init__(self) -> None:
        self.parsed = 0

    def parse(self, text: str, tools: Collection[str]) -> tuple[list[AnswerPart], int]:
        self.parsed += len(text)
        return super().parse(text, tools)


@pytest.mark.parametrize("begin", ["<tool_call>[", "<tool_call>{", '<tool_call>{"', '<tool_call>{"x": "'])
def test_the_work_for_repeated_ends_grows_with_the_answer(begin: str) -> None:
    format = CountingFormat()
    parser = AnswerParser(format, {"f"})
    ends = ["</tool_call>"] * 2_000
    parts = [part for piece in (begin, *ends) for part in parser.push(piece)] + parser.flush()
    assert "".join(map(str, parts)) == begin + "".join(ends)
    assert format.parsed < 2 * len("".join(ends))


def test_a_call_with_many_ends_in_a_string_is_read_at_the_end_of_the_answer() -> None:
    arguments = '{"x": "%s"}' % ("</tool_call>" * 100)
    text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    assert parse(HERMES, text, 5) == ("", [("f", arguments)])


def test_content_is_returned_as_soon_as_it_is_no_call() -> None:
    parser = AnswerParser(HERMES, {"f"})
    assert parser.push("I look <tool") == ["I look"]
    assert parser.push("s> at it") == [" <tools> at it"]
    assert parser.push("<tool_call>" + ROME[:-1]) == []
    assert parser.push("}") == []
    (call,) = parser.push("</tool_call>")
    assert isinstance(call, ToolCall)


@pytest.mark.parametrize("size", [1, 1_000])
@pytest.mark.parametrize(
    ("format", "text"),
    [
        (HERMES, f"<tool_call>{ROME}</tool_call><tool_call>{ROME}</tool_call> and more"),
        (MISTRAL, f"[TOOL_CALLS][{ROME}, {ROME}]"),
    ],
)
def test_nothing_follows_the_only_call(format: ToolCallFormat, text: str, size: int) -> None:
    assert parse(format, text, size, parallel=False) == ("", [CALL])


def test_mistrals_ids_are_kept_and_others_are_shortened() -> None:
    text = '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "VvvODy9mT"}]'
    (call,), _ = MISTRAL.parse(text, {"f"})
    assert isinstance(call, ToolCall)
    assert call.id == "call_VvvODy9mT"
    assert MISTRAL.template_id(call.id) == MISTRAL.template_id("VvvODy9mT") == "VvvODy9mT"
    assert short_id("call_of_another_length") == short_id("call_of_another_length") != short_id("call_2")
    assert len(short_id("call_2")) == 9
    assert HERMES.template_id("call_2") == "call_2"
