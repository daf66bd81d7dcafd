"""Text from the worker: messages in, pieces on a Redis list, with a real (tiny) model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from memory_limit import limit_pass_tokens
from prometheus_client import CollectorRegistry
from redis import Redis
from worker_bench import Bench

from cli.stack.process import wait_until
from heft_engine.serving.predictor import Predictor
from store.messages.broker import redis_py_url
from store.messages.generate import GenerateMessage, GenerateReply, SamplingParams
from store.messages.predict import PredictModel, cancelled_key
from worker.inference.generate import GenerateHandler
from worker.inference.metrics import InferenceMetrics
from worker.inference.models import Models
from worker.inference.requests import Requests

BASE = PredictModel(id="llama", owner="o", kind="base", base_model="llama", storage_key=None, manifest=None)
WISH = SamplingParams(
    max_tokens=12,
    temperature=1.0,
    top_p=1.0,
    seed=5,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    logit_bias={},
    top_logprobs=None,
    stop=[],
)
PROMPT = [{"prompt": "Once upon a time"}]


@pytest.fixture
def models(bench: Bench, tiny_llama_dir: Path) -> Iterator[Models]:
    context = bench.with_settings(model_dir=tiny_llama_dir.parent)
    models = Models(context, InferenceMetrics(CollectorRegistry()))
    yield models
    models.close()


class Asker:
    """Asks the worker, and reads what it says."""

    def __init__(self, bench: Bench, models: Models) -> None:
        self.bench = bench
        self.pool = models.pool
        self.redis: Any = Redis.from_url(redis_py_url(bench.context.settings.redis_url))
        self.handler = GenerateHandler(models, Requests(self.redis))

    def begin(self, request_id: str, **changes: Any) -> Future[None]:
        wish = {name: changes.pop(name) for name in WISH if name in changes}
        message: GenerateMessage = {
            "request_id": request_id,
            "model": BASE,
            "inputs": PROMPT,
            "n": 1,
            "wish": {**WISH, **wish},  # type: ignore[typeddict-item]
            "stream": False,
            "intervention": {"enabled": True, "scale": 1.0},
            "sent_at": time.time(),
            "deadline": time.time() + 60,
            "reply_to": f"replies-{request_id}",
            **changes,  # type: ignore[typeddict-item]
        }
        return self.bench.pool.submit(self.handler.handle, json.loads(json.dumps(message)))

    def heard(self, request_id: str) -> list[GenerateReply]:
        return [json.loads(reply) for reply in self.redis.lrange(f"replies-{request_id}", 0, -1)]

    def ask(self, request_id: str, **changes: Any) -> list[GenerateReply]:
        self.begin(request_id, **changes).result(60)
        return self.heard(request_id)

    def held_bytes(self) -> int:
        """Bytes that models hold beside their weights."""
        return self.pool.memory_bytes - self.pool.usage()["base"][1]


@pytest.fixture
def asker(bench: Bench, models: Models) -> Iterator[Asker]:
    asker = Asker(bench, models)
    yield asker
    asker.redis.close()


def text(replies: list[GenerateReply], index: int = 0) -> str:
    parts = [part for reply in replies for part in reply.get("chunk", []) if part["index"] == index]
    return "".join(part["text"] for part in parts)


def test_whole_and_streamed_say_the_same(asker: Asker) -> None:
    (whole,) = asker.ask("whole", top_logprobs=1)
    (part,) = whole["chunk"]
    assert (part["index"], part["finish_reason"], len(part["tokens"])) == (0, "length", 12)
    assert whole["done"]["completion_tokens"] == 12
    assert whole["done"]["prompt_tokens"] > 3
    assert "error" not in whole

    *streamed, last = asker.ask("streamed", stream=True, top_logprobs=1)
    assert streamed, "a stream of one reply is none"
    assert all("done" not in reply for reply in streamed)
    assert last["done"] == whole["done"]
    assert text([*streamed, last]) == part["text"]
    tokens = [token for reply in [*streamed, last] for one in reply["chunk"] for token in one["tokens"]]
    assert tokens == part["tokens"]
    assert 0 < asker.redis.ttl("replies-streamed") <= 60


def test_several_prompts_and_several_texts(asker: Asker) -> None:
    (both,) = asker.ask("both", inputs=[*PROMPT, {"prompt": "Twice"}], n=2)
    texts = [text([both], index) for index in range(4)]
    assert [part["index"] for part in both["chunk"]] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert both["done"]["completion_tokens"] == 48
    assert text(asker.ask("again")) == texts[0]
    assert text(asker.ask("next seed", seed=6)) == texts[1]


def test_a_prompt_is_repeated_and_may_be_token_ids(asker: Asker) -> None:
    (echoed,) = asker.ask("echo", echo=True, top_logprobs=0)
    (plain,) = asker.ask("plain")
    assert text([echoed]) == "Once upon a time" + text([plain])
    tokens = echoed["chunk"][0]["tokens"]
    assert tokens[0]["logprob"] is None
    assert len(tokens) == plain["done"]["prompt_tokens"] + 12
    (alone,) = asker.ask("alone", echo=True, max_tokens=0)
    assert (text([alone]), alone["done"]["completion_tokens"]) == ("Once upon a time", 0)

    with asker.pool.base("llama", "text") as predictor:
        ids = list(predictor.encoder.raw("Once upon a time").prompt)
    (by_ids,) = asker.ask("ids", inputs=[{"tokens": ids}], echo=True)
    assert text([by_ids]) == text([echoed])
    (refused,) = asker.ask("unknown", inputs=[{"tokens": [*ids, 10**6]}])
    assert (refused["error"]["status"], refused["error"]["param"]) == (400, "prompt")


def test_every_text_matches_the_constraint(asker: Asker) -> None:
    constraint = {"kind": "json_schema", "source": '{"enum": ["red", "green"]}', "param": "response_format"}
    (both,) = asker.ask("both", constraint=constraint, n=3)
    texts = [text([both], index) for index in range(3)]
    assert set(texts) <= {'"red"', '"green"'}
    assert [part["finish_reason"] for part in both["chunk"]] == ["stop"] * 3


def test_a_constraint_that_cannot_be_compiled_is_the_clients_fault(asker: Asker) -> None:
    constraint = {
        "kind": "json_schema",
        "source": '{"type": "strin"}',
        "param": "tools[0].function.parameters",
    }
    (reply,) = asker.ask("refused", constraint=constraint)
    assert reply["error"]["status"] == 400
    assert reply["error"]["param"] == "tools[0].function.parameters"
    assert "Unsupported type" in reply["error"]["message"]


def test_a_request_joins_those_under_way(asker: Asker) -> None:
    """The short one is answered while the long one is being written."""
    asker.ask("warm up")
    long = asker.begin("long", stream=True, max_tokens=150, stop=["never"])
    assert wait_until(lambda: bool(asker.heard("long")), seconds=30)
    asker.ask("short", max_tokens=2)
    assert not long.done()
    long.result(60)
    assert asker.heard("long")[-1]["done"]["completion_tokens"] == 150


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(asker: Asker, stream: bool) -> None:
    asker.ask("warm up")
    gone = asker.begin("gone", stream=stream, max_tokens=450)
    assert wait_until(lambda: asker.held_bytes() > 0, seconds=30)
    asker.redis.set(cancelled_key("gone"), 1, ex=600)
    gone.result(30)
    assert wait_until(lambda: asker.held_bytes() == 0, seconds=5)
    assert not any("done" in reply or "error" in reply for reply in asker.heard("gone"))


def test_time_that_is_over_frees_it_too(asker: Asker) -> None:
    asker.ask("warm up")
    asker.begin("late", max_tokens=450, deadline=time.time() + 0.3).result(30)
    assert wait_until(lambda: asker.held_bytes() == 0, seconds=5)
    assert asker.heard("late") == []
    assert asker.ask("too late", deadline=time.time() - 1) == []


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"max_tokens": 5_000}, 400, "max_tokens"),
        ({"inputs": [{"prompt": "long " * 900}]}, 400, "prompt"),
        ({"inputs": [*PROMPT, {"prompt": 1}]}, 400, "prompt[1]"),
        ({"inputs": [{"messages": [{"role": "robot", "content": "So"}]}]}, 400, "messages[0].role"),
        ({"model": {**BASE, "base_model": "gone"}}, 404, "model"),
    ],
)
def test_what_can_not_be_written_is_refused(
    asker: Asker, changes: dict[str, Any], status: int, param: str
) -> None:
    (reply,) = asker.ask("wrong", **changes)
    assert (reply["error"]["status"], reply["error"]["param"]) == (status, param)


def test_a_pass_that_fails_is_answered(asker: Asker, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asker.ask("warm up")

    def fail(_: Predictor) -> None:
        raise ArithmeticError

    with asker.pool.base("llama", "text") as predictor:
        lm = predictor.lm
    with monkeypatch.context() as patch:
        patch.setattr(lm, "finish", fail)
        asked = asker.begin("unlucky")
        with pytest.raises(ArithmeticError):
            asked.result(30)
    (reply,) = asker.heard("unlucky")
    assert (reply["error"]["status"], reply["error"]["code"]) == (500, "internal_error")
    assert "done" in asker.ask("after")[0]


def test_a_prompt_without_memory_is_answered_by_its_name(
    asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asker.ask("warm up")
    with monkeypatch.context() as patch:
        limit_pass_tokens(patch, 2)
        (reply,) = asker.ask("large")
    assert (reply["error"]["status"], reply["error"]["code"]) == (500, "out_of_memory")
    assert "no memory for a prompt of" in reply["error"]["message"]
    assert "done" in asker.ask("after")[0]


def test_a_prompt_that_is_too_long_has_openais_code(asker: Asker) -> None:
    for number, inputs in enumerate(
        ([{"prompt": "long " * 900}], [{"messages": [{"role": "user", "content": "long " * 900}]}])
    ):
        (reply,) = asker.ask(f"long-{number}", inputs=inputs)
        assert reply["error"]["code"] == "context_length_exceeded"
        # LiteLLM falls back to another model by these words.
        assert reply["error"]["message"].startswith("this model's maximum context length is")
