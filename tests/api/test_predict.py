"""/predict over HTTP, with a scripted worker on a real broker."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import redis
from stub_worker import StubWorker, answered

from store import models
from store.db.session import SessionFactory, transaction
from store.messages.broker import redis_py_url
from store.messages.predict import PredictMessage
from store.settings import StoreSettings

MODEL = "tiny"
QUESTION = {"model": MODEL, "question": "is the sky blue", "passage": "The sky is blue."}


@pytest.fixture(scope="module")
def stand_in(settings: StoreSettings, sessions: SessionFactory) -> Iterator[StubWorker]:
    with transaction(sessions) as session:
        models.offer_base(session, model_id=MODEL, source="directory", info={})
    with StubWorker(settings.redis_url) as stand_in:
        yield stand_in


@pytest.fixture
def worker(stand_in: StubWorker) -> StubWorker:
    """A new worker that answers every message."""
    stand_in.heard.clear()
    stand_in.behaviour = answered
    return stand_in


@pytest.mark.parametrize("path", ["/predict", "/v1/predict"])
def test_one_question(client: httpx.Client, worker: StubWorker, path: str) -> None:
    answer = client.post(path, json=QUESTION)
    assert answer.status_code == 200
    assert answer.json() == {
        "object": "prediction",
        "model": MODEL,
        "answer": "yes",
        "abstained": False,
        "probability": 0.75,
        "label_probabilities": {"yes": 0.75, "no": 0.25},
        "usage": {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5},
    }


def test_the_message_has_everything_for_the_worker(
    client: httpx.Client, worker: StubWorker, owner: str
) -> None:
    before = time.time()
    answer = client.post("/predict", json=QUESTION | {"intervention": {"enabled": False}})
    (message,) = worker.heard
    assert message["request_id"] == answer.headers["x-request-id"]
    assert message["model"] == {
        "id": MODEL,
        "owner": owner,
        "kind": "base",
        "base_model": MODEL,
        "storage_key": None,
        "manifest": None,
    }
    assert message["inputs"] == [{"question": QUESTION["question"], "passage": QUESTION["passage"]}]
    assert message["intervention"] == {"enabled": False, "scale": 1.0}
    assert before < message["sent_at"] == message["deadline"] - 2 < time.time()


@pytest.mark.parametrize(
    "question",
    [
        {"question": "which", "choices": ["a", "b"]},
        {"prompt": "Once upon"},
        {"messages": [{"role": "user", "content": "hello"}]},
    ],
)
def test_every_form_of_a_question_reaches_the_worker_unchanged(
    client: httpx.Client, worker: StubWorker, question: dict[str, Any]
) -> None:
    assert client.post("/predict", json={"model": MODEL, **question}).status_code == 200
    assert worker.heard[0]["inputs"] == [question]


def test_many_questions_are_answered_in_order(client: httpx.Client, worker: StubWorker) -> None:
    def numbered(message: PredictMessage) -> dict[str, Any]:
        reply = answered(message)
        for row, question in zip(reply["ok"]["data"], message["inputs"], strict=True):
            row["answer"] = question["question"]
        return reply

    worker.behaviour = numbered
    inputs = [{"question": str(number)} for number in range(1_024)]
    response = client.post("/predict", json={"model": MODEL, "inputs": inputs})
    assert response.headers["x-ratelimit-limit-requests"] == "4096"
    assert response.headers["x-ratelimit-remaining-requests"] == "3072"
    assert response.headers["x-ratelimit-reset-requests"].endswith("s")
    answer = response.json()
    assert (answer["object"], answer["model"]) == ("list", MODEL)
    assert [row["answer"] for row in answer["data"]] == [question["question"] for question in inputs]
    assert answer["usage"] == {"prompt_tokens": 1_024, "completion_tokens": 1_024, "total_tokens": 2_048}


def test_an_answer_below_abstain_below_is_null(client: httpx.Client, worker: StubWorker) -> None:
    def ask(abstain_below: float) -> dict[str, Any]:
        answer = client.post("/predict", json=QUESTION | {"abstain_below": abstain_below})
        assert answer.status_code == 200
        return dict(answer.json())

    withheld, answered = ask(0.76), ask(0.75)
    assert (withheld["answer"], withheld["abstained"]) == (None, True)
    assert (answered["answer"], answered["abstained"]) == ("yes", False)
    assert withheld["probability"] == answered["probability"] == 0.75
    assert withheld["label_probabilities"] == answered["label_probabilities"]
    many = client.post(
        "/predict", json={"model": MODEL, "inputs": [{"question": "q"}] * 2, "abstain_below": 1}
    )
    assert [(row["answer"], row["abstained"]) for row in many.json()["data"]] == [(None, True)] * 2


def test_replies_are_assigned_to_their_requests(client: httpx.Client, worker: StubWorker) -> None:
    """Sixty concurrent requests, answered in pairs in reverse order."""
    messages: list[PredictMessage] = []

    def in_reverse(message: PredictMessage) -> dict[str, Any] | None:
        messages.append(message)
        if len(messages) % 2:
            return None
        first = messages[-2]
        with redis.Redis.from_url(redis_py_url(worker.url)) as connection:
            for waiting in (message, first):
                reply = answered(waiting)
                reply["ok"]["data"][0]["answer"] = waiting["inputs"][0]["question"]
                connection.rpush(
                    waiting["reply_to"], json.dumps({"request_id": waiting["request_id"]} | reply)
                )
        return None

    worker.behaviour = in_reverse
    with ThreadPoolExecutor(60) as threads:
        answers = list(
            threads.map(
                lambda number: client.post("/predict", json={"model": MODEL, "question": f"q{number}"}),
                range(60),
            )
        )
    assert [answer.json()["answer"] for answer in answers] == [f"q{number}" for number in range(60)]


def test_a_workers_error_is_passed_on(client: httpx.Client, worker: StubWorker) -> None:
    fault = {"status": 400, "code": "invalid_value", "message": "no choices", "param": "choices"}
    worker.behaviour = lambda _: {"error": fault}
    answer = client.post("/predict", json=QUESTION)
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "no choices",
        "type": "invalid_request_error",
        "param": "choices",
        "code": "invalid_value",
    }


def test_a_model_that_is_not_loaded_in_time_is_503(client: httpx.Client, worker: StubWorker) -> None:
    worker.behaviour = lambda _: None
    started = time.monotonic()
    answer = client.post("/predict", json=QUESTION)
    assert time.monotonic() - started >= 2
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["error"]["code"] == "model_not_ready"


def test_late_and_malformed_replies_are_ignored(client: httpx.Client, worker: StubWorker) -> None:
    client.post("/predict", json=QUESTION)
    reply_to = worker.heard[0]["reply_to"]
    with redis.Redis.from_url(redis_py_url(worker.url)) as connection:
        late = json.dumps({"request_id": worker.heard[0]["request_id"]} | answered(worker.heard[0]))
        for payload in (late, b"\xff", b"[]", b"3", b"{}", b'{"request_id": []}'):
            connection.rpush(reply_to, payload)
    assert client.post("/predict", json=QUESTION).json()["answer"] == "yes"


def test_lost_connections_to_the_broker_are_restored(client: httpx.Client, worker: StubWorker) -> None:
    """The broker restarts: all connections of the API are gone, and the next question is answered."""
    assert client.post("/predict", json=QUESTION).status_code == 200
    with redis.Redis.from_url(redis_py_url(worker.url)) as connection:
        for listed in connection.client_list():
            if listed["cmd"] != "brpop":  # what the stand-in waits with
                connection.execute_command("CLIENT", "KILL", "ID", listed["id"], "SKIPME", "yes")
    for _ in range(3):
        assert client.post("/predict", json=QUESTION).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"question": "q"}, 400, "model"),
        ({"model": MODEL}, 400, None),
        ({"model": MODEL, "question": ""}, 400, "question"),
        ({"model": MODEL, "question": "q", "prompt": "p"}, 400, None),
        ({"model": MODEL, "question": "q", "inputs": [{"question": "q"}]}, 400, None),
        ({"model": MODEL, "prompt": "p", "passage": "p"}, 400, None),
        ({"model": MODEL, "question": "q", "choices": ["one"]}, 400, "choices"),
        ({"model": MODEL, "inputs": []}, 400, "inputs"),
        ({"model": MODEL, "inputs": [{"question": "q"}, {}]}, 400, None),
        ({"model": MODEL, "inputs": [{"question": "q", "answer": "yes"}]}, 400, "inputs[0].answer"),
        ({"model": MODEL, "inputs": [{"question": "q"}] * 1_025}, 413, "inputs"),
        ({"model": MODEL, "question": "\0"}, 400, "question"),
        ({"model": MODEL, "question": "q", "intervention": {"scale": "big"}}, 400, "intervention.scale"),
        ({"model": MODEL, "question": "q", "intervention": {"scal": 1}}, 400, "intervention.scal"),
        ({"model": MODEL, "question": "q", "abstain_below": 1.5}, 400, "abstain_below"),
        ({"model": MODEL, "prompt": "p", "abstain_below": 0.5}, 400, "abstain_below"),
        ({"model": MODEL, "inputs": [{"prompt": "p"}], "abstain_below": 0.5}, 400, "abstain_below"),
        ({"model": MODEL, "messages": [{"role": "robot", "content": ""}]}, 400, "messages[0].role"),
        ({"model": "nobody/knows", "question": "q"}, 404, "model"),
        ({"model": "../../etc", "question": "q"}, 404, "model"),
        ({"model": "ft:tiny:other::12345678", "question": "q"}, 404, "model"),
    ],
)
def test_invalid_requests_are_refused(
    client: httpx.Client, worker: StubWorker, body: dict[str, Any], status: int, param: str | None
) -> None:
    answer = client.post("/predict", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert worker.heard == []


def test_waiting_questions_do_not_delay_other_requests(client: httpx.Client, worker: StubWorker) -> None:
    """While questions wait, other requests are answered and other questions sent."""
    worker.behaviour = lambda _: None
    with ThreadPoolExecutor(60) as threads:
        waiting = [threads.submit(client.post, "/predict", json=QUESTION) for _ in range(60)]
        while len(worker.heard) < 2:
            assert client.get("/v1/models").status_code == 200
        assert not any(future.done() for future in waiting)
        assert {future.result().status_code for future in waiting} == {503}
