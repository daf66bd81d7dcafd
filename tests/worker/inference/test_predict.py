"""The inference side: a message in, an answer on a Redis list, with real (tiny) models."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry
from redis import Redis
from worker_bench import Bench

import heft_engine
from heft_engine.config.run_file import RunOptions
from heft_engine.config.train import LoraStage, ReftStage, TrainConfig
from heft_engine.data.rows import parse_row
from heft_engine.runtime import malloc
from store import models
from store.db.session import transaction
from store.db.tables import FineTunedModel
from store.messages.broker import connect_redis, redis_py_url
from store.messages.predict import PredictMessage, PredictModel, PredictReply, cancelled_key
from worker.inference import models as models_module
from worker.inference.metrics import InferenceMetrics
from worker.inference.models import Models
from worker.inference.predict import PredictHandler
from worker.inference.requests import Requests

ROWS = [
    {"question": f"is {n} even", "passage": f"The number is {n}.", "answer": n % 2 == 0} for n in range(16)
]
QUESTIONS = [{key: row[key] for key in ("question", "passage")} for row in ROWS]


@dataclass(frozen=True)
class Inference:
    models: Models
    handler: PredictHandler


@pytest.fixture(scope="module")
def bundle(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle trained for two steps, in the library."""
    config = TrainConfig(
        model="llama",
        stages=[LoraStage(n_epochs=1, learning_rate=0.05), ReftStage(n_epochs=1, learning_rate=0.05)],
        dtype="float32",
    )
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    rows = [parse_row(row) for row in ROWS]
    heft_engine.train(
        config, rows, [], out, lambda _: None, options=RunOptions(model_dir=tiny_llama_dir.parent)
    )
    return out


@pytest.fixture
def inference(bench: Bench, tiny_llama_dir: Path) -> Iterator[Inference]:
    context = bench.with_settings(model_dir=tiny_llama_dir.parent)
    metrics = InferenceMetrics(CollectorRegistry())
    models = Models(context, metrics)
    requests = Requests(connect_redis(context.settings.redis_url))
    yield Inference(models, PredictHandler(models, requests, metrics))
    models.close()
    requests.close()


@pytest.fixture
def model(bench: Bench, bundle: Path) -> PredictModel:
    """The bundle as a message addresses it."""
    manifest = bench.context.artifacts.put_directory("jobs/j/1/bundle", bundle)
    return PredictModel(
        id="ft:llama:o::1",
        owner="o",
        kind="final",
        base_model="llama",
        storage_key="jobs/j/1/bundle",
        manifest=manifest,
    )


BASE = PredictModel(id="llama", owner="o", kind="base", base_model="llama", storage_key=None, manifest=None)


def ask(
    bench: Bench, inference: Inference, model: PredictModel, inputs: list[dict[str, Any]], **changes: Any
) -> PredictReply | None:
    """The worker's reply; None if it pushed none."""
    message: PredictMessage = {
        "request_id": "r-1",
        "model": model,
        "inputs": inputs,
        "intervention": {"enabled": True, "scale": 1.0},
        "sent_at": time.time(),
        "deadline": time.time() + 60,
        "reply_to": "replies",
        **changes,  # type: ignore[typeddict-item]
    }
    inference.handler.handle(json.loads(json.dumps(message)))
    with Redis.from_url(redis_py_url(bench.context.settings.redis_url)) as redis:
        payload = redis.lpop("replies")
        assert payload is None or redis.llen("replies") == 0
    return None if payload is None else json.loads(payload)


def test_an_answer_has_the_scores_of_the_library(
    bench: Bench, inference: Inference, model: PredictModel, bundle: Path, tiny_llama_dir: Path
) -> None:
    predictor = heft_engine.load(bundle, model_dir=tiny_llama_dir.parent)
    expected = predictor.predict([parse_row(question, need_answer=False) for question in QUESTIONS])
    reply = ask(bench, inference, model, QUESTIONS)
    assert reply is not None
    assert reply["request_id"] == "r-1"
    probabilities = [row["probability"] for row in reply["ok"]["data"]]
    assert probabilities == pytest.approx([prediction.probability for prediction in expected], abs=1e-5)
    (alone,) = (ask(bench, inference, model, QUESTIONS[:1]) or {})["ok"]["data"]
    assert alone["probability"] == pytest.approx(probabilities[0], abs=1e-5)
    assert alone["answer"] in ("yes", "no")
    assert math.isclose(sum((alone["label_probabilities"] or {}).values()), 1.0, rel_tol=1e-5)


def test_the_intervention_is_switched_for_one_request_alone(
    bench: Bench, inference: Inference, model: PredictModel
) -> None:
    def probability(**intervention: Any) -> float | None:
        changes = {"intervention": {"enabled": True, "scale": 1.0, **intervention}}
        reply = ask(bench, inference, model, QUESTIONS[:1], **changes)
        assert reply is not None
        return reply["ok"]["data"][0]["probability"]

    usual = probability()
    assert probability(enabled=False) == probability(scale=0.0) != usual
    assert probability() == usual


def test_a_base_model_answers_any_task(bench: Bench, inference: Inference) -> None:
    reply = ask(bench, inference, BASE, QUESTIONS[:1])
    assert reply is not None
    assert reply["ok"]["data"][0]["answer"] in ("yes", "no")
    reply = ask(bench, inference, BASE, [{"question": "which", "choices": ["one", "two"]}])
    assert reply is not None
    assert reply["ok"]["data"][0]["answer"] in ("one", "two")
    reply = ask(bench, inference, BASE, [{"prompt": "Once"}])
    assert reply is not None
    assert reply["ok"]["data"][0]["probability"] is None


def test_an_expired_request_is_dropped(bench: Bench, inference: Inference, model: PredictModel) -> None:
    assert ask(bench, inference, model, QUESTIONS, deadline=time.time() - 1) is None


def test_a_cancelled_request_is_dropped(bench: Bench, inference: Inference, model: PredictModel) -> None:
    with Redis.from_url(redis_py_url(bench.context.settings.redis_url)) as redis:
        redis.set(cancelled_key("r-1"), 1)
    waited = {"sent_at": time.time() - 1}
    assert ask(bench, inference, model, QUESTIONS, **waited) is None
    assert ask(bench, inference, model, QUESTIONS, request_id="r-2", **waited) is not None


def test_a_deleted_model_is_forgotten_and_others_are_not(
    bench: Bench, inference: Inference, model: PredictModel
) -> None:
    ask(bench, inference, model, QUESTIONS[:1])
    ask(bench, inference, BASE, QUESTIONS[:1])
    assert inference.models.pool.names == [model["id"]]
    held = inference.models.pool.memory_bytes
    inference.models.record_usage()
    inference.models.evict_deleted()  # the database has never heard of it
    assert inference.models.pool.names == []
    assert 0 < inference.models.pool.memory_bytes < held


def test_a_bad_question_is_the_callers_fault(bench: Bench, inference: Inference, model: PredictModel) -> None:
    reply = ask(bench, inference, model, [QUESTIONS[0], {"question": ""}])
    assert reply is not None
    assert (reply["error"]["status"], reply["error"]["param"]) == (400, "inputs[1].question")
    reply = ask(bench, inference, model, [{"question": "which", "choices": ["one", "two"]}])
    assert reply is not None
    assert reply["error"]["status"] == 400, "a yes/no model is not asked to choose"


def test_a_damaged_bundle_is_not_served(bench: Bench, inference: Inference, model: PredictModel) -> None:
    add_row(bench, model)
    bench.context.artifacts.put_stream("jobs/j/1/bundle/heft.json", [b"{}"])
    reply = ask(bench, inference, model, QUESTIONS)
    assert reply is not None
    assert (reply["error"]["status"], reply["error"]["code"]) == (500, "artifact_damaged")


def test_a_model_that_is_deleted_while_its_question_waits_is_not_found(
    bench: Bench, inference: Inference, model: PredictModel
) -> None:
    add_row(bench, model)
    with transaction(bench.context.sessions) as session:
        models.delete(session, owner_id="o", model_id=model["id"])
    bench.context.artifacts.delete("jobs/j/1/bundle")
    reply = ask(bench, inference, model, QUESTIONS)
    assert reply is not None
    assert (reply["error"]["status"], reply["error"]["code"]) == (404, "model_not_found")


def add_row(bench: Bench, model: PredictModel) -> None:
    """Adds the model's row, which the API has read before it sent the question."""
    row = FineTunedModel(
        id=model["id"],
        owner_id=model["owner"],
        job_id=bench.created(b"{}"),
        kind="final",
        base_model=model["base_model"],
        storage_key=model["storage_key"],
        manifest=model["manifest"],
        task={"type": "yes_no"},
    )
    with transaction(bench.context.sessions) as session:
        session.add(row)


def test_a_base_model_that_is_gone_is_not_found(bench: Bench, inference: Inference) -> None:
    reply = ask(bench, inference, PredictModel(**{**BASE, "base_model": "gone"}), QUESTIONS)
    assert reply is not None
    assert (reply["error"]["status"], reply["error"]["code"]) == (404, "model_not_found")


def test_no_file_of_a_bundle_stays_behind(bench: Bench, inference: Inference, model: PredictModel) -> None:
    ask(bench, inference, model, QUESTIONS[:1])
    assert list(replace(bench.context).scratch.iterdir()) == []


def test_memory_goes_back_when_models_leave_and_when_nobody_asks(
    bench: Bench, inference: Inference, model: PredictModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    monkeypatch.setattr(malloc, "trim", lambda: given.append("back"))
    inference.models.trim_memory()
    assert ask(bench, inference, model, [{"question": "is it so"}])
    inference.models.trim_memory()
    assert given == [], "somebody has just asked"
    monkeypatch.setattr(models_module, "_IDLE_SECONDS", 0.0)
    inference.models.trim_memory()
    inference.models.trim_memory()
    assert given == ["back"], "once, until somebody asks again"
    monkeypatch.setattr(models_module, "_IDLE_SECONDS", 3_600.0)
    inference.models.pool.remove(model["id"])
    inference.models.trim_memory()
    inference.models.trim_memory()
    assert given == ["back"] * 2


def test_models_are_kept_to_what_trainers_leave_of_the_gpu(
    inference: Inference, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    monkeypatch.setattr(inference.models.pool, "limit", limits.append)
    gpu = SimpleNamespace(total_memory=24 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    for claimed_bytes in (20 << 30, 30 << 30, 0):
        inference.models.leave_free(claimed_bytes)
    assert limits == [2 << 30, 0, math.inf], "2 GiB are for libraries"
