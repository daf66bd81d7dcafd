"""Tool calls from the worker: answers that must be calls, written by tiny models of the families under a grammar."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from redis import Redis
from tiny_models import TOOL_FAMILIES, save_chat_model
from worker_bench import Bench

from heft_engine.data.tool_calls.format import AnswerParser
from heft_engine.data.tool_calls.hermes import HermesFormat
from heft_engine.serving.text_generator import TextDelta
from store.messages.broker import redis_py_url
from store.messages.generate import GeneratedPart, GenerateReply, SamplingParams, ToolUse
from store.messages.predict import PredictModel
from worker.inference.generate import GenerateHandler, append_delta
from worker.inference.metrics import InferenceMetrics
from worker.inference.models import Models
from worker.inference.requests import Requests

CITIES = {"enum": ["Rome", "Oslo"]}
PARAMETERS = {"type": "object", "properties": {"city": CITIES}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("rain", "wind")
]
QUESTION = {"role": "user", "content": "Does it rain?"}
REQUIRED = ToolUse(choice="required", name=None, parallel=False)
Ask = Callable[..., list[GenerateReply]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of all families."""
    folder = tmp_path_factory.mktemp("chat-models")
    for name in (*TOOL_FAMILIES, "gemma"):
        save_chat_model(folder / name, name)
    return folder


@pytest.fixture
def ask(bench: Bench, folder: Path) -> Iterator[Ask]:
    """Returns a function that asks a model and returns the replies."""
    models = Models(bench.with_settings(model_dir=folder), InferenceMetrics(CollectorRegistry()))
    redis: Any = Redis.from_url(redis_py_url(bench.context.settings.redis_url))
    handler = GenerateHandler(models, Requests(redis))
    numbers = itertools.count()

    def ask(model: str, *, messages: Any = (QUESTION,), n: int = 1, **changes: Any) -> list[GenerateReply]:
        sampling = SamplingParams(
            max_tokens=changes.pop("max_tokens", 200),
            temperature=1.0,
            top_p=1.0,
            seed=3,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            logit_bias={},
            top_logprobs=None,
            stop=[],
        )
        message: Any = {
            # Of its own: the end of the request before it may still be on its way to the batch.
            "request_id": f"request {next(numbers)}",
            "model": PredictModel(
                id=model, owner="o", kind="base", base_model=model, storage_key=None, manifest=None
            ),
            "inputs": [{"messages": list(messages), "tools": TOOLS}],
            "n": n,
            "wish": sampling,
            "stream": False,
            "tool_use": REQUIRED,
            "intervention": {"enabled": True, "scale": 1.0},
            "sent_at": time.time(),
            "deadline": time.time() + 60,
            "reply_to": "replies",
            **changes,
        }
        redis.delete("replies")
        handler.handle(message)
        return [json.loads(reply) for reply in redis.lrange("replies", 0, -1)]

    yield ask
    models.close()
    redis.close()


@pytest.mark.parametrize("family", TOOL_FAMILIES)
def test_a_required_call_is_always_one(ask: Ask, family: str) -> None:
    (reply,) = ask(family, n=4)
    assert "chunk" in reply, reply
    for part in reply["chunk"]:
        assert (part["text"], part["finish_reason"]) == ("", "tool_calls")
        (call,) = part["tool_calls"]
        assert (call["index"], call["id"][:5]) == (0, "call_")
        assert call["name"] in ("rain", "wind")
        assert json.loads(call["arguments"])["city"] in CITIES["enum"]
    assert len({call["id"] for part in reply["chunk"] for call in part["tool_calls"]}) == 4


def test_a_named_tool_is_called_and_its_call_can_be_sent_back(ask: Ask) -> None:
    for family in TOOL_FAMILIES:
        (reply,) = ask(family, tool_use={**REQUIRED, "name": "wind"}, stream=True)[-1:]
        (call,) = reply["chunk"][0]["tool_calls"]
        assert call["name"] == "wind"
        function = {"name": call["name"], "arguments": call["arguments"]}
        history = [
            QUESTION,
            {"role": "assistant", "content": "", "tool_calls": [{"id": call["id"], "function": function}]},
            {"role": "tool", "tool_call_id": call["id"], "content": "calm"},
        ]
        (reply,) = ask(family, messages=history, tool_use=None, max_tokens=4)
        assert reply["done"]["completion_tokens"] <= 4


def test_several_calls_where_they_are_allowed(ask: Ask) -> None:
    (reply,) = ask("qwen2", n=8, tool_use={**REQUIRED, "parallel": True}, max_tokens=400)
    finished = [part for part in reply["chunk"] if part["finish_reason"] == "tool_calls"]
    assert max(len(part["tool_calls"]) for part in finished) > 1
    for part in finished:
        assert [call["index"] for call in part["tool_calls"]] == list(range(len(part["tool_calls"])))


@pytest.mark.parametrize("family", TOOL_FAMILIES)
def test_an_answer_with_a_format_is_a_call_or_has_it(ask: Ask, family: str) -> None:
    constraint = {"kind": "json_schema", "source": '{"enum": ["fine", "wet"]}', "param": "response_format"}
    auto = ToolUse(choice="auto", name=None, parallel=False)
    (reply,) = ask(family, n=12, tool_use=auto, constraint=constraint)
    calls = [part for part in reply["chunk"] if part["finish_reason"] == "tool_calls"]
    answers = [part for part in reply["chunk"] if part["finish_reason"] == "stop"]
    assert len(calls) + len(answers) == 12
    assert {part["text"] for part in answers} <= {'"fine"', '"wet"'}
    assert all(part["tool_calls"][0]["name"] in ("rain", "wind") for part in calls)


def test_arguments_of_a_tool_without_parameters_are_an_object(ask: Ask) -> None:
    tools = [{"type": "function", "function": {"name": "rain", "parameters": {}}}]
    (reply,) = ask("qwen2", inputs=[{"messages": [QUESTION], "tools": tools}], n=4)
    for part in reply["chunk"]:
        for call in part.get("tool_calls", []):
            assert isinstance(json.loads(call["arguments"]), dict)
        if not part.get("tool_calls"):
            assert part["finish_reason"] == "length"
            assert '"arguments": {' in part["text"]


def test_a_tool_that_no_grammar_holds_is_refused_by_its_part(ask: Ask) -> None:
    odd = {"type": "object", "properties": {"city": {"type": "string", "format": "uri"}}}
    tools = [TOOLS[0], {"type": "function", "function": {"name": "odd", "parameters": odd}}]
    (reply,) = ask("qwen2", inputs=[{"messages": [QUESTION], "tools": tools}])
    assert reply["error"]["status"] == 400
    assert reply["error"]["param"] == "tools[1].function.parameters.properties.city.format"
    tools = [TOOLS[0], {"type": "function", "function": {"name": "odd", "parameters": {"enum": ["x"]}}}]
    (reply,) = ask("qwen2", inputs=[{"messages": [QUESTION], "tools": tools}])
    assert (reply["error"]["status"], reply["error"]["param"]) == (400, "tools[1].function.parameters")


def test_tools_that_are_too_large_together_are_refused(ask: Ask) -> None:
    long = {"type": "object", "properties": {"x": {"type": "string", "pattern": "a{500}b{400}"}}}
    tools = [{"type": "function", "function": {"name": f"f{n}", "parameters": long}} for n in range(2)]
    (reply,) = ask("qwen2", inputs=[{"messages": [QUESTION], "tools": tools}])
    assert reply["error"]["status"] == 400
    assert reply["error"]["param"] == "tools[1].function.parameters.properties.x.pattern"


def test_text_without_calls_stays_text(ask: Ask) -> None:
    auto = ToolUse(choice="auto", name=None, parallel=True)
    (plain,) = ask("qwen2", tool_use=None, max_tokens=12)
    (offered,) = ask("qwen2", tool_use=auto, max_tokens=12)
    assert plain["chunk"] == offered["chunk"]
    assert plain["chunk"][0]["text"]


def test_a_template_without_tools_is_refused_by_name(ask: Ask) -> None:
    (reply,) = ask("gemma")
    assert (reply["error"]["status"], reply["error"]["param"]) == (400, "tools")
    assert "does not render tools" in reply["error"]["message"]


def test_calls_in_an_unknown_format_are_refused(ask: Ask, folder: Path) -> None:
    template = folder / "qwen3" / "chat_template.jinja"
    written = template.read_text()
    template.write_text(written.replace("<tool_call>", "<function>"))
    try:
        (reply,) = ask("qwen3")
    finally:
        template.write_text(written)
    assert (reply["error"]["status"], reply["error"]["param"]) == (400, "tools")
    assert "hermes, mistral, llama3_json" in reply["error"]["message"]


def test_a_schema_without_a_grammar_is_refused(ask: Ask) -> None:
    parameters = {"type": "object", "properties": {"x": {"$ref": "#/nowhere"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    (reply,) = ask("qwen2", inputs=[{"messages": [QUESTION], "tools": tools}])
    assert (reply["error"]["status"], reply["error"]["param"]) == (
        400,
        "tools[0].function.parameters.properties.x.$ref",
    )


def appended(*deltas: TextDelta, parallel: bool = True) -> list[GeneratedPart]:
    """Returns the parts that deltas become, each in a part of its own."""
    parser = AnswerParser(HermesFormat(), {"f"}, parallel=parallel)
    parts = []
    for delta in deltas:
        part = GeneratedPart(index=0, text="", tokens=[], finish_reason=None)
        append_delta(part, delta, parser)
        parts.append(part)
    return parts


CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


def test_content_and_calls_of_a_stream() -> None:
    first, second, last = appended(
        TextDelta(text=f"I look.\n{CALL[:20]}"),
        TextDelta(text=f"{CALL[20:]}\n{CALL}"),
        TextDelta(text="\n", finish_reason="stop"),
    )
    assert (first["text"], first.get("tool_calls")) == ("I look.", None)
    assert [call["index"] for call in second["tool_calls"]] == [0, 1]
    assert (last["text"], last["finish_reason"]) == ("", "tool_calls")


def test_an_answer_ends_after_its_only_call() -> None:
    (part,) = appended(TextDelta(text=CALL + CALL), parallel=False)
    assert len(part["tool_calls"]) == 1
    assert part["finish_reason"] == "tool_calls"


def test_a_call_that_is_cut_off_stays_text() -> None:
    (part,) = appended(TextDelta(text=CALL[:30], finish_reason="length"))
    assert (part["text"], part["finish_reason"], part.get("tool_calls")) == (CALL[:30], "length", None)
