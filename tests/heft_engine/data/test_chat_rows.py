"""Chat rows of OpenAI's fine-tuning format, and refusals that name their field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from heft_engine.data.chat_rows import Message
from heft_engine.data.rows import parse_row, read_rows
from heft_engine.data.tool_rows import Tool, ToolCall
from heft_engine.errors import RowError

USER = {"role": "user", "content": "hello"}
ASSISTANT = {"role": "assistant", "content": "hi"}
FUNCTION = {"name": "look_up", "description": "Looks up.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


def call(id: str = "call_1", **function: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "look_up", "arguments": "{}"} | function}


CALL = {"role": "assistant", "content": None, "tool_calls": [call()]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "found"}


def test_a_conversation() -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    row = parse_row(
        {
            "messages": [
                {"role": "developer", "content": "be kind"},
                {"role": "user", "content": parts, "name": "Ann"},
                {"role": "assistant", "content": "no", "weight": 0, "tool_calls": None, "refusal": None},
                USER,
                {**ASSISTANT, "weight": 1, "annotations": [], "reasoning_content": "It is a greeting."},
            ]
        }
    )
    assert row.messages == (
        Message(role="system", content="be kind"),
        Message(role="user", content="hello", name="Ann"),
        Message(role="assistant", content="no", weight=0),
        Message(role="user", content="hello"),
        Message(role="assistant", content="hi", reasoning_content="It is a greeting."),
    )


def test_a_conversation_to_go_on_with() -> None:
    row = parse_row({"messages": [USER]}, need_answer=False)
    assert row.messages == (Message(role="user", content="hello"),)


def test_tools_calls_and_results() -> None:
    strict = {"type": "function", "function": {"strict": True, **FUNCTION}}
    row = parse_row(
        {"messages": [USER, CALL, RESULT, ASSISTANT], "tools": [strict], "parallel_tool_calls": False}
    )
    assert row.tools == (Tool(name="look_up", description="Looks up.", parameters=NO_PARAMETERS),)
    assert row.messages is not None
    _, called, result, _ = row.messages
    assert called.tool_calls == (ToolCall(id="call_1", name="look_up", arguments="{}"),)
    assert called.is_supervised
    assert (called.content, result.tool_call_id, result.name) == ("", "call_1", "look_up")


def test_a_tool_has_its_fields_in_one_order_and_parameters() -> None:
    (tool,) = parse_row({"messages": [USER, ASSISTANT], "tools": [{"function": {"name": "now"}}]}).tools
    assert tool.to_json() == {"type": "function", "function": {"name": "now", "parameters": NO_PARAMETERS}}
    turned = {"function": dict(reversed(FUNCTION.items())), "type": "function"}
    (tool,) = parse_row({"messages": [USER, ASSISTANT], "tools": [turned]}).tools
    assert list(tool.to_json()["function"]) == ["name", "description", "parameters"]


def test_the_older_functions_are_tools() -> None:
    new = parse_row({"messages": [USER, CALL, RESULT, ASSISTANT], "tools": TOOLS})
    old = parse_row(
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "look_up", "arguments": "{}"},
                },
                {"role": "function", "name": "look_up", "content": "found"},
                ASSISTANT,
            ],
            "functions": [FUNCTION],
        }
    )
    assert old.tools == new.tools
    assert old.messages is not None
    assert [message.role for message in old.messages] == ["user", "assistant", "tool", "assistant"]
    assert old.messages[2].tool_call_id == old.messages[1].tool_calls[0].id


def test_an_id_may_be_used_again_in_a_later_message() -> None:
    row = parse_row({"messages": [USER, CALL, RESULT, USER, CALL, RESULT, ASSISTANT], "tools": TOOLS})
    assert row.messages is not None
    assert sum(message.is_supervised for message in row.messages) == 3


def test_a_greeting_before_the_first_question_is_not_supervised() -> None:
    row = parse_row({"messages": [ASSISTANT, USER, ASSISTANT]})
    assert row.messages is not None
    assert [message.is_supervised for message in row.messages] == [False, False, True]


@pytest.mark.parametrize(
    "extra", [{"tools": []}, {"tools": None}, {"parallel_tool_calls": False}, {"functions": []}]
)
def test_empty_fields_of_tools_change_nothing(extra: dict[str, Any]) -> None:
    assert parse_row({"messages": [USER, ASSISTANT], **extra}) == parse_row({"messages": [USER, ASSISTANT]})


@pytest.mark.parametrize(
    "history",
    [
        [USER, {"role": "assistant", "content": ""}, USER],
        [USER, {"role": "assistant", "content": "x", "annotations": [], "tool_calls": []}, USER],
        [USER, ASSISTANT],
        [{"role": "user", "content": None}],
        [USER, {"role": "assistant", "content": None}, USER],
        [USER, {**CALL, "tool_calls": [{**call(), "index": 0}]}, {**RESULT, "content": ""}],
    ],
)
def test_a_request_takes_history_as_it_was_given_back(history: list[Any]) -> None:
    row = parse_row({"messages": history}, need_answer=False)
    assert row.messages is not None
    assert len(row.messages) == len(history)


def refusal(row: dict[str, Any], words: str) -> RowError:
    with pytest.raises(RowError, match=words) as caught:
        parse_row(row)
    return caught.value


@pytest.mark.parametrize(
    ("messages", "param", "words"),
    [
        ("hello", "messages", "a string"),
        ([], "messages", "empty"),
        (["hello"], "messages[0]", "a string"),
        ([{"content": "x"}], "messages[0].role", "missing"),
        ([{"role": "robot", "content": "x"}], "messages[0].role", "'robot'"),
        ([{"role": "user"}, ASSISTANT], "messages[0].content", "missing"),
        ([{**USER, "name": 3}, ASSISTANT], "messages[0].name", "a number"),
        ([USER, {**ASSISTANT, "weight": 2}], "messages[1].weight", "0 or 1"),
        ([USER, {**ASSISTANT, "weight": True}], "messages[1].weight", "0 or 1"),
        ([{**USER, "weight": 1}, ASSISTANT], "messages[0].weight", "assistant turns only"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT],
            "messages[0].content[0]",
            "only text",
        ),
        ([USER], "messages", "an assistant turn with weight 1"),
        ([USER, {**ASSISTANT, "weight": 0}], "messages", "an assistant turn with weight 1"),
        ([ASSISTANT], "messages", "after the first turn"),
        ([USER, {**ASSISTANT, "refusal": "no"}], "messages[1].refusal", "as the assistant's content"),
        ([{**USER, "reasoning_content": "x"}, ASSISTANT], "messages[0].reasoning_content", "unknown field"),
        ([{**USER, "tool_calls": [call()]}, ASSISTANT], "messages[0].tool_calls", "unknown field"),
        ([USER, {**ASSISTANT, "tool_call_id": "call_1"}], "messages[1].tool_call_id", "unknown field"),
        ([USER, {"role": "assistant"}], "messages[1].content", "missing"),
    ],
)
def test_faults_in_conversations_name_the_turn(messages: object, param: str, words: str) -> None:
    assert refusal({"messages": messages}, words).param == param


def _calls(*calls: Any) -> list[Any]:
    return [USER, {"role": "assistant", "tool_calls": list(calls)}]


OF_CALL = "messages[1].tool_calls[0]"


@pytest.mark.parametrize(
    ("messages", "param", "words"),
    [
        ([USER, {"role": "assistant", "tool_calls": "x"}], "messages[1].tool_calls", "an array"),
        (_calls("x"), OF_CALL, "a JSON object"),
        (_calls({**call(), "type": "custom"}), f"{OF_CALL}.type", "only 'function'"),
        (_calls({**call(), "id": None}), f"{OF_CALL}.id", "missing"),
        (_calls({**call(), "function": None}), f"{OF_CALL}.function", "null"),
        (_calls({**call(), "odd": 1}), f"{OF_CALL}.odd", "unknown field"),
        (_calls(call(name="x y")), f"{OF_CALL}.function.name", "1 to 64 characters"),
        (_calls(call(name="other")), f"{OF_CALL}.function.name", "not the name of one of the row's tools"),
        (
            _calls(call(arguments={"a": 1})),
            f"{OF_CALL}.function.arguments",
            "must be a string, not an object",
        ),
        (_calls(call(arguments="{a}")), f"{OF_CALL}.function.arguments", "a JSON object written as a string"),
        (_calls(call(arguments="[]")), f"{OF_CALL}.function.arguments", "not an array"),
        (_calls(call(arguments='{"a": NaN}')), f"{OF_CALL}.function.arguments", "NaN is not JSON"),
        (_calls(call(arguments='{"a":' + "[" * 100_000)), f"{OF_CALL}.function.arguments", "a JSON object"),
        (
            _calls(call(arguments='{"a": [1, -1e999]}')),
            f"{OF_CALL}.function.arguments.a[1]",
            "not a finite number",
        ),
        (_calls(call(arguments='{"\\ud800": 1}')), f"{OF_CALL}.function.arguments", "lone surrogate"),
        (_calls(call(), call()), "messages[1].tool_calls[1].id", "the id of another call"),
        (
            [USER, {**CALL, "function_call": {"name": "look_up", "arguments": "{}"}}],
            "messages[1].function_call",
            "set one of them",
        ),
        (
            [USER, {"role": "assistant", "function_call": {"name": "look_up", "arguments": ""}}],
            "messages[1].function_call.arguments",
            "empty",
        ),
        ([USER, RESULT, ASSISTANT], "messages[1].tool_call_id", "not the id of a tool call before it"),
        ([USER, CALL, {**RESULT, "tool_call_id": None}], "messages[2].tool_call_id", "missing"),
        (
            [USER, CALL, {**RESULT, "tool_call_id": "call_2"}],
            "messages[2].tool_call_id",
            "'call_2' is not the id",
        ),
        ([USER, CALL, RESULT, RESULT], "messages[3].tool_call_id", "answered by an earlier tool message"),
        (
            [USER, {"role": "function", "name": "look_up", "content": "x"}],
            "messages[1].name",
            "a call before it",
        ),
        ([USER, {"role": "function", "content": "x"}], "messages[1].name", "missing"),
    ],
)
def test_faults_in_calls_name_the_field(messages: list[Any], param: str, words: str) -> None:
    assert refusal({"messages": messages, "tools": TOOLS}, words).param == param


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": {}}, "tools", "an array, not an object"),
        ({"tools": ["x"]}, "tools[0]", "a JSON object"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "only 'function'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "null"),
        ({"tools": [{"function": {"name": "a"}, "odd": 1}]}, "tools[0].odd", "unknown field"),
        ({"tools": [{"function": {}}]}, "tools[0].function.name", "missing"),
        ({"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name", "1 to 64 characters"),
        (
            {"tools": [{"function": {"name": "a", "strict": "x"}}]},
            "tools[0].function.strict",
            "true or false",
        ),
        (
            {"tools": [{"function": {"name": "a", "parameters": []}}]},
            "tools[0].function.parameters",
            "schema",
        ),
        (
            {"tools": [{"function": {"name": "a", "parameters": {"type": "string"}}}]},
            "tools[0].function.parameters.type",
            "must be 'object'",
        ),
        (
            {"tools": [{"function": {"name": "a", "parameters": {"maximum": float("inf")}}}]},
            "tools[0].function.parameters.maximum",
            "not a finite number",
        ),
        ({"tools": [*TOOLS, *TOOLS]}, "tools[1].function.name", "the name of an earlier tool"),
        ({"tools": TOOLS * 129}, "tools", "at most 128"),
        ({"functions": [FUNCTION, FUNCTION]}, "functions[1].name", "the name of an earlier tool"),
        ({"tools": TOOLS, "functions": [FUNCTION]}, "functions", "not both"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "true or false"),
        ({"tool_choice": "auto"}, "tool_choice", "belongs to requests"),
        ({"function_call": "auto"}, "function_call", "belongs to an assistant message"),
        ({"documents": ["x"]}, "documents", "into a message"),
        ({"odd\0\udc00": 1}, "odd\\x00\\udc00", "unknown field"),
    ],
)
def test_faults_beside_the_messages_name_the_field(fields: dict[str, Any], param: str, words: str) -> None:
    error = refusal({"messages": [USER, ASSISTANT], **fields}, words)
    assert error.param == param
    (error.message + param).encode()
    assert "\0" not in error.message + param


@pytest.mark.parametrize("depth", [60, 70, 400])
def test_schemas_and_arguments_have_a_bounded_depth(depth: int) -> None:
    nested: Any = {}
    for _ in range(depth):
        nested = {"x": nested}
    deep_tool = {"function": {"name": "look_up", "parameters": nested}}
    deep_call = {"role": "assistant", "tool_calls": [call(arguments=json.dumps(nested))]}
    for row in (
        {"messages": [USER, ASSISTANT], "tools": [deep_tool]},
        {"messages": [USER, deep_call], "tools": TOOLS},
    ):
        if depth < 64:
            parse_row(row)
        else:
            refusal(row, "nested too deeply: at most 64 levels")


def test_two_calls_at_once_are_refused_where_parallel_calls_are_off() -> None:
    both = [USER, {"role": "assistant", "tool_calls": [call(), call("call_2")]}]
    row = {"messages": both, "tools": TOOLS, "parallel_tool_calls": False}
    assert refusal(row, "has 2 calls, but parallel_tool_calls is false").param == "messages[1].tool_calls"
    parse_row(row | {"parallel_tool_calls": True})


def test_a_fault_in_a_file_names_line_and_field(tmp_path: Path) -> None:
    good = {"messages": [USER, CALL], "tools": TOOLS}
    bad = {"messages": [USER, {"role": "assistant", "tool_calls": [call(arguments="{")]}], "tools": TOOLS}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [good, good, bad])))
    with pytest.raises(
        RowError, match=r"line 3: messages\[1\]\.tool_calls\[0\]\.function\.arguments must be"
    ) as caught:
        read_rows(tmp_path / "rows.jsonl", param="data")
    assert (caught.value.line, caught.value.param) == (3, "messages[1].tool_calls[0].function.arguments")


@pytest.mark.parametrize("name", ["\0", "\udc00"])
def test_a_name_that_can_not_be_stored_is_written_with_escapes(name: str) -> None:
    error = refusal({name: 1}, "unknown row format")
    assert error.param in ("\\x00", "\\udc00")
