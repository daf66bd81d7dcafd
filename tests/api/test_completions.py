"""Completions over HTTP, with a scripted worker on a real broker."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import httpx
import pytest
import redis
from stub_worker import StubWorker

from cli.stack.process import wait_until
from store import models
from store.db.session import SessionFactory, transaction
from store.messages.broker import redis_py_url
from store.messages.generate import GeneratedPart, GeneratedToken, GenerateMessage
from store.messages.predict import cancelled_key
from store.settings import StoreSettings

MODEL = "tiny"
COMPLETION = {"model": MODEL, "prompt": "Once"}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
PATHS = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}
DONE = {"done": {"prompt_tokens": 3, "completion_tokens": 2}}
FAULT = {"status": 400, "code": "invalid_value", "message": "too long", "param": "max_tokens"}


@pytest.fixture(scope="module")
def worker(settings: StoreSettings, sessions: SessionFactory) -> Iterator[StubWorker]:
    with transaction(sessions) as session:
        models.offer_base(session, model_id=MODEL, source="directory", info={})
    with StubWorker(settings.redis_url) as stand_in:
        yield stand_in


@pytest.fixture
def says(worker: StubWorker) -> Callable[..., list[GenerateMessage]]:
    """`says(reply, …)` sets the worker's replies, and returns the list of messages that it receives."""
    worker.heard.clear()

    def says(*replies: dict[str, Any]) -> list[GenerateMessage]:
        def behaviour(message: Any) -> None:
            with redis.Redis.from_url(redis_py_url(worker.url)) as connection:
                for reply in replies:
                    payload = json.dumps({"request_id": message["request_id"]} | reply)
                    connection.rpush(message["reply_to"], payload)

        worker.behaviour = behaviour
        return cast(list[GenerateMessage], worker.heard)

    return says


#: Of DONE.
USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 0},
}


def token(text: bytes, offset: int, *top: bytes) -> GeneratedToken:
    likely: Any = [{"bytes": list(other), "logprob": -0.25} for other in top]
    return {"bytes": list(text), "logprob": -0.5, "top": likely, "offset": offset}


def part(text: str, *, index: int = 0, finish: Any = None, tokens: Any = ()) -> GeneratedPart:
    return {"index": index, "text": text, "tokens": list(tokens), "finish_reason": finish}


def named_tool(name: str, **options: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}, **options}}


def odd_tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"x": {"not": {"type": "string"}}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def schema_format(schema: Any, **options: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **options}}


def wide_schema() -> dict[str, Any]:
    """Returns a schema with most of the optional properties that a request may have."""
    return {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(300)}}


def wide_tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": wide_schema()}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def called(id: str = "call_1") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}}


def events(answer: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_a_completion_in_openais_shape(client: httpx.Client, says: Any) -> None:
    euro = [token(b"a", 0, b"b"), token(b"\xe2", 1), token(b"\x82\xac", 1)]
    says({"chunk": [part("a€", finish="stop", tokens=euro)]} | DONE)
    before = int(time.time())
    answer = client.post("/v1/completions", json=COMPLETION | {"logprobs": 1}).json()
    assert before <= answer.pop("created") <= time.time()
    assert answer.pop("id").startswith("cmpl-")
    assert re.fullmatch("fp_[0-9a-f]{10}", answer.pop("system_fingerprint"))
    assert answer == {
        "object": "text_completion",
        "model": MODEL,
        "choices": [
            {
                "text": "a€",
                "index": 0,
                "finish_reason": "stop",
                "logprobs": {
                    "tokens": ["a", "bytes:\\xe2", "bytes:\\x82\\xac"],
                    "token_logprobs": [-0.5, -0.5, -0.5],
                    "top_logprobs": [
                        {"b": -0.25, "a": -0.5},
                        {"bytes:\\xe2": -0.5},
                        {"bytes:\\x82\\xac": -0.5},
                    ],
                    "text_offset": [0, 1, 1],
                },
            }
        ],
        "usage": USAGE,
    }


def test_a_chat_in_openais_shape(client: httpx.Client, says: Any) -> None:
    says({"chunk": [part("Hi", finish="length", tokens=[token(b"Hi", 0, b"Ho")])]} | DONE)
    body = CHAT | {"logprobs": True, "top_logprobs": 1}
    response = client.post("/v1/chat/completions", json=body)
    assert response.headers["x-ratelimit-limit-requests"] == "256"
    assert response.headers["x-ratelimit-remaining-requests"] == "255"
    answer = response.json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    top = [{"token": "Ho", "logprob": -0.25, "bytes": [72, 111]}]
    content = [{"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": top}]
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hi", "refusal": None},
            "logprobs": {"content": content, "refusal": None},
            "finish_reason": "length",
        }
    ]


def test_a_stream_in_openais_shape(client: httpx.Client, says: Any) -> None:
    says({"chunk": [part("Hi")]}, {"chunk": [part("", finish="stop")]} | DONE)
    body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-ratelimit-remaining-requests"] == "255"
    *chunks, last, end = events(answer)
    assert end == "[DONE]"
    assert (last["choices"], last["usage"]) == ([], USAGE)
    assert len({(chunk["id"], chunk["created"]) for chunk in [*chunks, last]}) == 1
    assert all(chunk["usage"] is None for chunk in chunks)
    shown = [chunk["choices"][0] for chunk in chunks]
    common = {"index": 0, "logprobs": None, "finish_reason": None}
    assert shown == [
        {**common, "delta": {"role": "assistant", "content": ""}},
        {**common, "delta": {"content": "Hi"}},
        {**common, "delta": {}, "finish_reason": "stop"},
    ]
    *chunks, end = events(client.post("/v1/completions", json=COMPLETION | {"stream": True}))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Hi", ""]
    assert all("usage" not in chunk for chunk in chunks)


def test_the_message_has_everything_for_the_worker(client: httpx.Client, says: Any) -> None:
    heard = says({"chunk": [part("x", finish="stop")]} | DONE)
    settings: dict[str, Any] = {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": -3,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "logit_bias": {"5": -100},
        "stop": "\n",
        "n": 2,
    }
    heft_fields = {
        "intervention": {"enabled": True, "scale": 0.5},
        "user": "u",
        "logprobs": 0,
        "suffix": None,
    }
    answer = client.post("/v1/completions", json=COMPLETION | settings | heft_fields | {"prompt": ["a", "b"]})
    (message,) = heard
    assert message["request_id"] == answer.headers["x-request-id"]
    assert message["inputs"] == [{"prompt": "a"}, {"prompt": "b"}]
    assert (message["n"], message["stream"]) == (2, False)
    wish = {name: value for name, value in settings.items() if name != "n"}
    assert message["wish"] == {**wish, "stop": ["\n"], "top_logprobs": 0}
    assert message["intervention"] == {"enabled": True, "scale": 0.5}
    assert message["sent_at"] + 2 == pytest.approx(message["deadline"])

    client.post("/v1/completions", json=COMPLETION)
    client.post("/v1/chat/completions", json=CHAT)
    plain = {"temperature": 1.0, "top_p": 1.0, "seed": None, "stop": [], "logit_bias": {}}
    assert plain.items() <= heard[1]["wish"].items()
    assert (heard[1]["wish"]["max_tokens"], heard[2]["wish"]["max_tokens"]) == (16, None)
    assert heard[2]["inputs"] == [{"messages": CHAT["messages"]}]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_has_its_own_status(client: httpx.Client, says: Any, path: str, stream: bool) -> None:
    says({"error": FAULT})
    answer = client.post(path, json=PATHS[path] | {"stream": stream})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "max_tokens"
    says()
    answer = client.post(path, json=PATHS[path] | {"stream": stream})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["error"]["code"] == "model_not_ready"


def test_an_error_in_mid_stream_is_an_event_with_an_error_object(client: httpx.Client, says: Any) -> None:
    says({"chunk": [part("Hi")]}, {"error": FAULT | {"status": 500, "code": "internal_error"}})
    first, fault = events(client.post("/v1/completions", json=COMPLETION | {"stream": True}))
    assert first["choices"][0]["text"] == "Hi"
    assert fault == {
        "error": {
            "message": "too long",
            "type": "server_error",
            "param": "max_tokens",
            "code": "internal_error",
        }
    }
    says({"chunk": [part("Hi")]})
    _, fault = events(client.post("/v1/completions", json=COMPLETION | {"stream": True}))
    assert fault["error"]["code"] == "model_not_ready"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_of_a_disconnected_client_is_marked_as_cancelled(
    client: httpx.Client, says: Any, worker: StubWorker, path: str, stream: bool
) -> None:
    """Before the first chunk, and in mid-stream."""
    heard = says({"chunk": [part("Hi")]}) if stream else says()
    if stream:
        with client.stream("POST", path, json=PATHS[path] | {"stream": True}) as answer:
            assert next(answer.iter_lines()).startswith("data: ")
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post(path, json=PATHS[path], timeout=0.3)
    with redis.Redis.from_url(redis_py_url(worker.url)) as connection:
        assert wait_until(lambda: len(heard) == 1, seconds=5)
        key = cancelled_key(heard[0]["request_id"])
        assert wait_until(lambda: connection.exists(key) == 1, seconds=1.5), "sooner than the time limit"
        assert 0 < cast(int, connection.ttl(key)) <= 600


def test_a_complete_answer_is_not_cancelled(client: httpx.Client, says: Any, worker: StubWorker) -> None:
    heard = says({"chunk": [part("x", finish="stop")]} | DONE)
    for stream in (False, True):
        client.post("/v1/completions", json=COMPLETION | {"stream": stream})
    with redis.Redis.from_url(redis_py_url(worker.url)) as connection:
        assert not any(connection.exists(cancelled_key(message["request_id"])) for message in heard)


@pytest.mark.parametrize(
    ("path", "changes", "param"),
    [
        ("/v1/completions", {"prompt": [1, "a"]}, "prompt"),
        ("/v1/completions", {"prompt": [[1], []]}, "prompt"),
        ("/v1/completions", {"prompt": [-1]}, "prompt"),
        ("/v1/completions", {"prompt": [1.5]}, "prompt"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ("/v1/chat/completions", {"echo": True}, "echo"),
        ("/v1/chat/completions", {"max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {"suffix": "end"}, "suffix"),
        ("/v1/completions", {"best_of": 3}, "best_of"),
        ("/v1/completions", {"logprobs": 6}, "logprobs"),
        ("/v1/completions", {"n": 129}, "n"),
        ("/v1/completions", {"store": True}, "store"),
        ("/v1/completions", {"max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ("/v1/completions", {"stop": ""}, "stop"),
        ("/v1/completions", {"temperature": 3}, "temperature"),
        ("/v1/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("/v1/completions", {"intervention": {"strange": 1}}, "intervention.strange"),
        ("/v1/completions", {"tools": [{"type": "function"}]}, "tools"),
        ("/v1/chat/completions", {"tools": [{"type": "function"}]}, "tools[0].function"),
        ("/v1/chat/completions", {"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ("/v1/chat/completions", {"tools": [named_tool("a b")]}, "tools[0].function.name"),
        ("/v1/chat/completions", {"tool_choice": "required"}, "tool_choice"),
        (
            "/v1/chat/completions",
            {"tools": [named_tool("f")], "tool_choice": named("g")},
            "tool_choice.function.name",
        ),
        ("/v1/chat/completions", {"functions": [{"name": "f"}]}, "functions"),
        ("/v1/chat/completions", {"function_call": "auto"}, "function_call"),
        ("/v1/chat/completions", {"response_format": {"type": "xml"}}, "response_format"),
        (
            "/v1/chat/completions",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
            "response_format.json_schema.name",
        ),
        (
            "/v1/chat/completions",
            {"response_format": schema_format({"properties": {"x": {"type": "string", "pattern": "(?=a)"}}})},
            "response_format.json_schema.schema.properties.x.pattern",
        ),
        (
            "/v1/chat/completions",
            {"response_format": schema_format({"properties": {"x": {}}, "required": ["x"]}, strict=True)},
            "response_format.json_schema.schema.additionalProperties",
        ),
        (
            "/v1/chat/completions",
            {"tools": [named_tool("f"), odd_tool("g")], "tool_choice": "required"},
            "tools[1].function.parameters.properties.x.not",
        ),
        (
            "/v1/chat/completions",
            {"tools": [named_tool("f", strict=True)], "tool_choice": "required"},
            "tools[0].function.parameters.additionalProperties",
        ),
        (
            "/v1/chat/completions",
            {"tools": [odd_tool("g")], "response_format": {"type": "json_object"}},
            "tools[0].function.parameters.properties.x.not",
        ),
        (
            "/v1/chat/completions",
            {"tools": [wide_tool("f"), wide_tool("g")], "tool_choice": "required"},
            "tools[1].function.parameters.required",
        ),
        (
            "/v1/chat/completions",
            {"tools": [wide_tool("f")], "response_format": schema_format(wide_schema())},
            "tools[0].function.parameters.required",
        ),
        (
            "/v1/chat/completions",
            {
                "tools": [named_tool("f", parameters={"anyOf": [{"type": "string"}]})],
                "tool_choice": "required",
            },
            "tools[0].function.parameters",
        ),
        ("/v1/chat/completions", {"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ("/v1/chat/completions", {"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "tool_call_id": "x"}]}, "messages[0]"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "tool_calls": [called()]}]}, "messages[0]"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "a"}]}]},
            "messages[0].tool_calls[0].function",
        ),
    ],
)
def test_an_unsupported_field_is_refused_by_name(
    client: httpx.Client, path: str, changes: dict[str, Any], param: str
) -> None:
    answer = client.post(path, json=PATHS[path] | changes)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_unknown_fields_are_ignored_and_named(client: httpx.Client, says: Any) -> None:
    heard = says({"chunk": [part("x", finish="stop")]} | DONE)
    part_with_cache = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": [part_with_cache], "name": "me", "mood": "good"}],
        "user": "u",
        "metadata": {"a": "b"},
        "verbosity": "low",
        "odd\r\nnäme": 1,
    }
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.headers["x-heft-ignored"].split(",") == [
        "user",
        "metadata",
        "verbosity",
        "odd%0D%0An%C3%A4me",
        "messages[0].mood",
        "messages[0].content[0].cache_control",
    ]
    turn = {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "me"}
    assert heard[0]["inputs"] == [{"messages": [turn]}]

    streamed = client.post("/v1/completions", json=COMPLETION | {"stream": True, "strange": 1})
    assert streamed.headers["x-heft-ignored"] == "strange"
    assert "x-heft-ignored" not in client.post("/v1/completions", json=COMPLETION).headers
    many = {f"unknown_{number}": 1 for number in range(500)}
    assert len(client.post("/v1/completions", json=COMPLETION | many).headers["x-heft-ignored"]) == 1_000


@pytest.mark.parametrize(
    ("prompt", "inputs"),
    [
        ([5, 6], [{"tokens": [5, 6]}]),
        ([[5], [6, 7]], [{"tokens": [5]}, {"tokens": [6, 7]}]),
        (["a", "b"], [{"prompt": "a"}, {"prompt": "b"}]),
    ],
)
def test_prompts_may_be_token_ids(client: httpx.Client, says: Any, prompt: Any, inputs: Any) -> None:
    heard = says({"chunk": [part("x", finish="stop")]} | DONE)
    assert client.post("/v1/completions", json=COMPLETION | {"prompt": prompt}).status_code == 200
    assert (heard[0]["inputs"], heard[0]["echo"]) == (inputs, False)


def test_an_echoed_prompt_has_log_probabilities_but_for_its_first_token(
    client: httpx.Client, says: Any
) -> None:
    first: Any = {"bytes": [97], "logprob": None, "top": [], "offset": 0}
    heard = says({"chunk": [part("ab", finish="length", tokens=[first, token(b"b", 1, b"c")])]} | DONE)
    body = COMPLETION | {"echo": True, "max_tokens": 0, "logprobs": 1}
    (choice,) = client.post("/v1/completions", json=body).json()["choices"]
    assert (heard[0]["echo"], heard[0]["wish"]["max_tokens"]) == (True, 0)
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5]
    assert choice["logprobs"]["top_logprobs"] == [None, {"c": -0.25, "b": -0.5}]


def test_a_request_may_have_128_texts(client: httpx.Client, says: Any) -> None:
    heard = says({"chunk": [part("x", finish="stop")]} | DONE)
    for path, body in PATHS.items():
        assert client.post(path, json=body | {"n": 128}).status_code == 200
    assert [message["n"] for message in heard] == [128, 128]


def test_empty_values_of_unsupported_fields_are_accepted(client: httpx.Client, says: Any) -> None:
    """Default values that clients send, and an assistant message sent back as it was received."""
    says({"chunk": [part("x", finish="stop")]} | DONE)
    nothing = {"echo": False, "suffix": None, "best_of": 1, "stream": False, "metadata": {}, "store": False}
    assert client.post("/v1/completions", json=COMPLETION | nothing).status_code == 200
    turns = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        *CHAT["messages"],
        {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "Again"},
    ]
    nothing = {"tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": False}
    assert client.post("/v1/chat/completions", json={"model": MODEL, "messages": turns} | nothing).is_success


@pytest.mark.parametrize("path", PATHS)
def test_the_model_is_authorized_before_the_request_is_sent(
    client: httpx.Client, says: Any, path: str
) -> None:
    heard = says()
    answer = client.post(path, json=PATHS[path] | {"model": "ft:none"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert heard == []


def generated_call(index: int, arguments: str = '{"city": "Rome"}') -> Any:
    return {"index": index, "id": f"call_{index}", "name": "f", "arguments": arguments}


def test_tool_calls_in_openais_shape(client: httpx.Client, says: Any) -> None:
    calls = [generated_call(0), generated_call(1, "{}")]
    says({"chunk": [{**part("", finish="tool_calls"), "tool_calls": calls}]} | DONE)
    body = CHAT | {"tools": [named_tool("f")]}
    (choice,) = client.post("/v1/chat/completions", json=body).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [
            {
                "id": "call_0",
                "type": "function",
                "function": {"name": "f", "arguments": '{"city": "Rome"}'},
            },
            {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        ],
    }


def test_streamed_tool_calls_in_openais_shape(client: httpx.Client, says: Any) -> None:
    says(
        {"chunk": [part("I look.")]},
        {"chunk": [{**part(""), "tool_calls": [generated_call(0)]}]},
        {"chunk": [{**part("", finish="tool_calls"), "tool_calls": [generated_call(1, "{}")]}]} | DONE,
    )
    body = CHAT | {"tools": [named_tool("f")], "stream": True}
    *chunks, end = events(client.post("/v1/chat/completions", json=body))
    assert end == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "I look."},
        {
            "tool_calls": [
                {"index": 0, "id": "call_0", "type": "function", "function": {"name": "f", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": "Rome"}'}}]},
        {
            "tool_calls": [
                {"index": 1, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {},
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    says({"chunk": [{**part("", finish="tool_calls"), "tool_calls": [generated_call(0)]}]} | DONE)
    first, *_ = events(client.post("/v1/chat/completions", json=body))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": None}


def test_the_message_says_how_tools_may_be_called(client: httpx.Client, says: Any) -> None:
    heard = says({"chunk": [part("x", finish="stop")]} | DONE)
    parameters = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
    tool = {
        "type": "function",
        "function": {"strict": True, "parameters": parameters, "description": "F.", "name": "f"},
    }
    turns = [
        *CHAT["messages"],
        {"role": "assistant", "content": None, "tool_calls": [{**called(), "index": 0}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "found"},
    ]
    for choice in ("auto", "required", named("f"), None, "none"):
        body = {"model": MODEL, "messages": turns, "tools": [tool], "tool_choice": choice}
        assert client.post("/v1/chat/completions", json=body).is_success
    auto = {"choice": "auto", "name": None, "parallel": True}
    required = {"choice": "required", "name": None, "parallel": True}
    one = {"choice": "required", "name": "f", "parallel": False}
    assert [message["tool_use"] for message in heard] == [auto, required, one, auto, None]
    (row,) = heard[0]["inputs"]
    assert row["tools"] == [
        {
            "type": "function",
            "function": {"name": "f", "description": "F.", "parameters": parameters},
        }
    ]
    assert row["messages"][1:] == [
        {"role": "assistant", "content": "", "tool_calls": [called()]},
        {"role": "tool", "content": "found", "tool_call_id": "call_1"},
    ]
    assert "tools" not in heard[-1]["inputs"][0]
    body = {"model": MODEL, "messages": turns, "tools": [tool], "parallel_tool_calls": False}
    assert client.post("/v1/chat/completions", json=body).is_success
    assert heard[-1]["tool_use"] == auto | {"parallel": False}


@pytest.mark.parametrize(
    "history",
    [
        [*CHAT["messages"], {"role": "assistant", "content": ""}, *CHAT["messages"]],
        [{"role": "assistant", "content": "x", "annotations": [], "tool_calls": []}, *CHAT["messages"]],
        [*CHAT["messages"], {"role": "assistant", "content": "The"}],
        [{"role": "user", "content": None}],
    ],
)
def test_history_is_accepted_as_it_was_given_back(
    client: httpx.Client, says: Any, history: list[Any]
) -> None:
    heard = says({"chunk": [part("x", finish="stop")]} | DONE)
    answer = client.post("/v1/chat/completions", json={"model": MODEL, "messages": history})
    assert answer.is_success, answer.text
    assert "x-heft-ignored" not in answer.headers
    assert [turn["content"] for turn in heard[0]["inputs"][0]["messages"]] == [
        turn["content"] or "" for turn in history
    ]


class TestResponseFormat:
    SCHEMA: ClassVar[dict[str, Any]] = {
        "type": "object",
        "title": "Colour",
        "properties": {"name": {"type": "string"}, "shade": {"type": "integer", "minimum": 0}},
        "required": ["name", "shade"],
        "additionalProperties": False,
    }

    def constraint(self, client: httpx.Client, says: Any, **fields: Any) -> Any:
        heard = says({"chunk": [part("{}", finish="stop")]} | DONE)
        answer = client.post("/v1/chat/completions", json=CHAT | fields)
        assert answer.status_code == 200, answer.text
        assert "x-heft-ignored" not in answer.headers
        return heard[-1]["constraint"]

    @pytest.mark.parametrize("strict", [True, False, None])
    def test_a_schema_travels_as_grammars_hold_it(
        self, client: httpx.Client, says: Any, strict: bool | None
    ) -> None:
        format = schema_format(self.SCHEMA, strict=strict, description="a colour")
        constraint = self.constraint(client, says, response_format=format)
        assert constraint["kind"] == "json_schema"
        assert constraint["param"] == "response_format.json_schema.schema"
        schema = json.loads(constraint["source"])
        assert schema == {name: value for name, value in self.SCHEMA.items() if name != "title"}
        assert list(schema["properties"]) == ["name", "shade"]

    def test_any_object_and_any_text(self, client: httpx.Client, says: Any) -> None:
        constraint = self.constraint(client, says, response_format={"type": "json_object"})
        assert json.loads(constraint["source"])["type"] == "object"
        nameless = {"type": "json_schema", "json_schema": {"name": "any"}}
        assert self.constraint(client, says, response_format=nameless)["source"] == constraint["source"]
        assert self.constraint(client, says, response_format={"type": "text"}) is None
        assert self.constraint(client, says) is None

    def test_schemas_of_tools_that_need_not_be_called_are_free(self, client: httpx.Client, says: Any) -> None:
        assert self.constraint(client, says, tools=[odd_tool("f")]) is None

    def test_a_schema_that_the_worker_cannot_compile(self, client: httpx.Client, says: Any) -> None:
        param = "response_format.json_schema.schema"
        says({"error": FAULT | {"param": param, "message": "its grammar was not compiled within 10 s"}})
        answer = client.post(
            "/v1/chat/completions", json=CHAT | {"response_format": schema_format(self.SCHEMA)}
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
        assert answer.json()["error"]["type"] == "invalid_request_error"
