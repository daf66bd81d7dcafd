"""The unmodified openai package against the whole service: API, workers, Postgres, Valkey, a model that trains."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import openai
import pydantic
import pytest
from openai.types.fine_tuning import FineTuningJob
from running_stack import HeftUp, heft_up
from tiny_models import save_chat_model

from cli.stack.home import Home
from cli.stack.process import wait_until

MODEL, MODEL_WITH_TOOLS = "tiny", "tiny-tools"
YES_NO = [
    {"question": f"is {number} an even number", "passage": "Numbers.", "answer": number % 2 == 0}
    for number in range(24)
]
CHAT = [
    {
        "messages": [
            {"role": "system", "content": "You count."},
            {"role": "user", "content": f"After {number}?"},
            {"role": "assistant", "content": f"{number + 1}"},
        ]
    }
    for number in range(16)
]


class Pet(pydantic.BaseModel):
    kind: Literal["cat", "dog"]
    lives: Annotated[int, pydantic.Field(ge=1, le=9)]


class Person(pydantic.BaseModel):
    name: Annotated[str, pydantic.Field(max_length=10, description="Given name")]
    height: Annotated[float, pydantic.Field(ge=0, le=3)] | None
    pets: Annotated[list[Pet], pydantic.Field(max_length=2)]


@pytest.fixture(scope="module")
def service(make_tiny_model: Callable[[str], Path]) -> Iterator[HeftUp]:
    """`heft up` with two base models in its folder, tiny random Llamas: one's chat template has tools."""
    folder = Path(tempfile.mkdtemp(prefix="heft-test-", dir="/tmp"))
    folder.chmod(0o711)
    models = folder / "models"
    models.mkdir()
    shutil.copytree(make_tiny_model("llama"), models / MODEL)
    save_chat_model(models / MODEL_WITH_TOOLS, "qwen2")
    try:
        with heft_up(Home.at(folder / "home"), HEFT_MODEL_DIR=str(models), OMP_NUM_THREADS="1") as service:
            yield service
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def client(service: HeftUp) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.record.url}/v1", api_key=service.key) as client:
        yield client


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def upload(client: openai.OpenAI, rows: list[dict[str, Any]]) -> str:
    return client.files.create(file=("rows.jsonl", jsonl(rows)), purpose="fine-tune").id


def small(**settings: Any) -> dict[str, Any]:
    """A job of seconds: OpenAI's hyperparameters, and HEFT's settings in the extra body."""
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 8}}}
    return {"method": method, "extra_body": {"max_length": 64, **settings}}


def until(client: openai.OpenAI, job_id: str, *statuses: str) -> FineTuningJob:
    """The job, once it is in one of these states."""
    jobs = client.fine_tuning.jobs
    assert wait_until(lambda: jobs.retrieve(job_id).status in statuses, seconds=150), jobs.retrieve(job_id)
    return jobs.retrieve(job_id)


class TestFiles:
    def test_from_create_to_delete(self, client: openai.OpenAI) -> None:
        content = jsonl(YES_NO)
        created = client.files.create(file=("boolq.jsonl", content), purpose="fine-tune")
        assert (created.object, created.filename, created.bytes) == ("file", "boolq.jsonl", len(content))

        assert client.files.wait_for_processing(created.id) == created
        assert client.files.retrieve(created.id) == created
        assert client.files.content(created.id).read() == content

        deleted = client.files.delete(created.id)
        assert (deleted.id, deleted.deleted) == (created.id, True)
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(created.id)

    def test_pages_are_turned_by_the_package(self, client: openai.OpenAI) -> None:
        ids = [upload(client, YES_NO) for _ in range(5)]
        assert [file.id for file in client.files.list(limit=2, order="desc")][:5] == ids[::-1]
        first = client.files.list(limit=2)
        assert first.has_next_page()
        assert first.get_next_page().data[0].id == ids[2]


class TestJobs:
    def test_pause_resume_cancel(self, client: openai.OpenAI) -> None:
        jobs = client.fine_tuning.jobs
        job = jobs.create(
            model=MODEL, training_file=upload(client, YES_NO), metadata={"run": "wishes"}, **small()
        )
        assert job.status == "validating_files"
        assert isinstance(job.seed, int)

        jobs.pause(job.id)
        until(client, job.id, "paused")
        jobs.resume(job.id)
        jobs.cancel(job.id)
        assert until(client, job.id, "cancelled").finished_at is not None

        codes = [event.data["code"] for event in jobs.list_events(job.id, limit=2)]  # type: ignore[index]
        assert (codes[0], codes[-1]) == ("CANCELLED", "CREATED")
        assert {"PAUSED", "RESUMED"} <= set(codes)
        with pytest.raises(openai.BadRequestError) as refusal:
            jobs.cancel(job.id)
        assert refusal.value.code == "job_ended"

    def test_lists_turn_pages_and_filter(self, client: openai.OpenAI) -> None:
        jobs = client.fine_tuning.jobs
        file_id = upload(client, YES_NO)
        ids = [
            jobs.create(model=MODEL, training_file=file_id, metadata={"run": "list"}, **small()).id
            for _ in range(2)
        ]
        for job_id in ids:
            jobs.cancel(job_id)
        assert [job.id for job in jobs.list(limit=1, metadata={"run": "list"})] == ids[::-1]

    def test_a_bad_row_fails_the_job_and_is_named(self, client: openai.OpenAI) -> None:
        rows = [*YES_NO, {"question": "is it", "passage": "", "answer": "perhaps"}]
        job = client.fine_tuning.jobs.create(model=MODEL, training_file=upload(client, rows))
        failed = until(client, job.id, "failed", "succeeded")
        assert failed.status == "failed"
        assert failed.error is not None
        assert failed.error.code == "invalid_training_file"
        assert f"line {len(rows)}" in failed.error.message
        assert failed.model_extra is not None
        (fault,) = failed.model_extra["validation"]["faults"]
        assert (fault["file"], fault["line"], fault["field"]) == ("training_file", len(rows), "answer")


class TestErrors:
    def test_not_found(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError):
            client.fine_tuning.jobs.retrieve("ftjob-none")
        with pytest.raises(openai.NotFoundError):
            client.fine_tuning.jobs.checkpoints.list("ftjob-none")
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("ft:nobody/knows:it")

    def test_what_can_not_be(self, client: openai.OpenAI) -> None:
        method: Any = {"type": "lora", "lora": {"rank": 0}}
        with pytest.raises(openai.BadRequestError) as refusal:
            client.fine_tuning.jobs.create(model=MODEL, training_file="sample:passages", method=method)
        assert refusal.value.param == "method.lora.rank"
        assert refusal.value.type == "invalid_request_error"
        with pytest.raises(openai.BadRequestError):
            client.post("/fine_tuning/jobs", content=b"{", cast_to=FineTuningJob)

    def test_a_wrong_key(self, service: HeftUp) -> None:
        with (
            openai.OpenAI(base_url=f"{service.record.url}/v1", api_key="sk-wrong") as stranger,
            pytest.raises(openai.AuthenticationError) as refusal,
        ):
            stranger.models.list()
        assert refusal.value.code == "invalid_api_key"

    def test_a_base_model_can_not_be_deleted(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.PermissionDeniedError):
            client.models.delete(MODEL)

    def test_each_carries_its_request_id(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as refusal:
            client.files.retrieve("file-none")
        assert refusal.value.request_id is not None
        assert client.models.list()._request_id is not None


@pytest.fixture(scope="module")
def job(client: openai.OpenAI) -> FineTuningJob:
    created = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=upload(client, YES_NO),
        suffix="even",
        seed=3,
        **small(test_file=upload(client, YES_NO[:8]), task={"type": "yes_no"}),
    )
    job = until(client, created.id, "succeeded", "failed", "cancelled")
    assert job.status == "succeeded", job.error
    return job


class TestATrainedModel:
    def test_the_job_shows_what_came_of_it(self, client: openai.OpenAI, job: FineTuningJob) -> None:
        extra = job.model_extra
        assert extra is not None
        assert (job.model, job.seed) == (MODEL, 3)
        assert job.trained_tokens is not None
        assert job.trained_tokens > 2 * len(YES_NO)
        assert [result["stage"] for result in extra["evaluation"]["results"]] == ["base", "lora", "reft"]
        assert (extra["evaluation"]["split"], extra["evaluation"]["n"]) == ("test", 8)
        assert extra["parity"]
        assert job.method is not None
        assert job.method.type == "supervised"
        assert job.method.supervised is not None
        assert job.method.supervised.hyperparameters is not None
        assert job.method.supervised.hyperparameters.n_epochs == job.hyperparameters.n_epochs == 1
        (results,) = job.result_files
        assert client.files.retrieve(results).purpose == "fine-tune-results"
        assert b"loss" in client.files.content(results).read().splitlines()[0]

    def test_models_and_checkpoints(self, client: openai.OpenAI, service: HeftUp, job: FineTuningJob) -> None:
        name = job.fine_tuned_model
        assert name is not None
        assert {MODEL, name} <= {model.id for model in client.models.list()}
        assert client.models.retrieve(name).owned_by == job.organization_id

        checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id, limit=1)
        stages = {item.fine_tuned_model_checkpoint: item.step_number for item in checkpoints}
        assert set(stages) == {f"{name}:ckpt-lora", f"{name}:ckpt-reft"}
        assert stages[f"{name}:ckpt-lora"] < stages[f"{name}:ckpt-reft"]

        asked = [{"question": row["question"], "passage": row["passage"]} for row in YES_NO[:3]]
        headers = {"Authorization": f"Bearer {service.key}"}
        for model in (name, f"{name}:ckpt-lora", MODEL):
            answer = httpx.post(
                f"{service.record.url}/predict",
                json={"model": model, "inputs": asked},
                headers=headers,
                timeout=60,
            )
            assert answer.status_code == 200, answer.text
            for row in answer.json()["data"]:
                assert row["answer"] in ("yes", "no")
                assert sum(row["label_probabilities"].values()) == pytest.approx(1, abs=1e-6)

        assert client.models.delete(name).deleted
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)

    def test_a_job_goes_on_from_a_checkpoint_that_is_deleted_at_once(
        self, client: openai.OpenAI, service: HeftUp, job: FineTuningJob
    ) -> None:
        start = f"{job.fine_tuned_model}:ckpt-lora"
        rows = upload(client, YES_NO)
        created = client.fine_tuning.jobs.create(
            model=start, training_file=rows, suffix="further", **small(test_file=rows)
        )
        assert client.models.delete(start).deleted
        with pytest.raises(openai.BadRequestError) as refusal:
            client.fine_tuning.jobs.create(model=start, training_file=rows)
        assert (refusal.value.param, refusal.value.code) == ("model", "model_not_found")

        ended = until(client, created.id, "succeeded", "failed")
        assert (ended.status, ended.model) == ("succeeded", start), ended.error
        assert str(ended.fine_tuned_model).startswith(f"ft:{MODEL}:{job.organization_id}:further:")
        assert ended.model_extra is not None
        results = ended.model_extra["evaluation"]["results"]
        assert [result["stage"] for result in results] == ["start", "lora", "reft"]
        model = client.models.retrieve(str(ended.fine_tuned_model))
        assert model.model_extra is not None
        assert (model.model_extra["started_from"], model.model_extra["base_model"]) == (start, MODEL)
        answer = httpx.post(
            f"{service.record.url}/predict",
            json={"model": model.id, "inputs": [{"question": "is 4 an even number", "passage": "Numbers."}]},
            headers={"Authorization": f"Bearer {service.key}"},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text


TURNS: Any = [{"role": "system", "content": "You count."}, {"role": "user", "content": "After 3?"}]


class TestText:
    """Written by the base model: of random weights, but the same words at every greedy asking."""

    @pytest.fixture(autouse=True)
    def _offered(self, client: openai.OpenAI) -> None:
        assert wait_until(lambda: MODEL in {model.id for model in client.models.list()}, seconds=60)

    def test_a_completion_whole_and_streamed(self, client: openai.OpenAI) -> None:
        asked: Any = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
        whole = client.completions.create(**asked)
        assert (whole.object, whole.model, whole.id[:5]) == ("text_completion", MODEL, "cmpl-")
        (choice,) = whole.choices
        assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
        assert choice.text
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 12
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12

        chunks = list(client.completions.create(**asked, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
        assert {chunk.id for chunk in chunks} == {chunks[0].id}
        assert not any(chunk.usage for chunk in chunks)

    def test_several_texts_with_logprobs_and_a_seed(self, client: openai.OpenAI) -> None:
        asked: Any = {"model": MODEL, "max_tokens": 6, "seed": 7, "n": 2, "logprobs": 3}
        both = client.completions.create(prompt=["Once", "Twice"], **asked)
        assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
        assert both.choices[0].text != both.choices[1].text
        for choice in both.choices:
            logprobs = choice.logprobs
            assert logprobs is not None
            assert logprobs.tokens is not None
            assert logprobs.top_logprobs is not None
            assert logprobs.text_offset is not None
            assert len(logprobs.tokens) == len(logprobs.top_logprobs) == 6
            assert logprobs.text_offset[0] == 0
            assert all(3 <= len(top) <= 4 for top in logprobs.top_logprobs)
        again = client.completions.create(prompt="Once", **asked)
        assert [choice.text for choice in again.choices] == [choice.text for choice in both.choices[:2]]

    def test_a_prompt_is_echoed_with_its_logprobs(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(
            model=MODEL, prompt="Once upon", echo=True, max_tokens=1, logprobs=1, temperature=0
        )
        (choice,) = answer.choices
        assert choice.text.startswith("Once upon")
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None
        assert choice.logprobs.token_logprobs is not None
        assert "".join(choice.logprobs.tokens).startswith("Once upon")
        assert choice.logprobs.token_logprobs[0] is None
        assert None not in choice.logprobs.token_logprobs[1:]
        assert answer.usage is not None
        assert len(choice.logprobs.tokens) == answer.usage.total_tokens

    def test_an_answer_becomes_a_pydantic_model(self, client: openai.OpenAI) -> None:
        """`parse` sends the model's schema with strict: true. Drawn from random weights, every answer matches it."""
        messages: Any = [{"role": "user", "content": "Who is it?"}]
        parse = client.chat.completions.parse
        answer = parse(model=MODEL, messages=messages, response_format=Person, n=4, seed=1, max_tokens=300)
        people = [choice.message.parsed for choice in answer.choices]
        assert all(isinstance(person, Person) for person in people)
        assert len({str(person) for person in people}) == 4
        assert {choice.finish_reason for choice in answer.choices} == {"stop"}

        with client.chat.completions.stream(
            model=MODEL, messages=messages, response_format=Person, seed=1, max_tokens=300
        ) as stream:
            streamed = stream.get_final_completion().choices[0].message.parsed
        assert streamed == people[0]

        with pytest.raises(openai.LengthFinishReasonError):
            parse(model=MODEL, messages=messages, response_format=Person, max_tokens=5)

    def test_any_json_object(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Something as JSON"}],
            response_format={"type": "json_object"},
            max_tokens=80,
            seed=2,
            n=4,
        )
        texts = [choice.message.content or "" for choice in answer.choices]
        assert all(text.startswith("{") for text in texts)
        for choice in answer.choices:
            if choice.finish_reason == "stop":
                assert isinstance(json.loads(choice.message.content or ""), dict)

    def test_a_schema_that_no_grammar_holds(self, client: openai.OpenAI) -> None:
        schema = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}
        format: Any = {"type": "json_schema", "json_schema": {"name": "tags", "schema": schema}}
        with pytest.raises(openai.BadRequestError) as refusal:
            client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "Tags?"}], response_format=format
            )
        assert refusal.value.param == "response_format.json_schema.schema.properties.tags.uniqueItems"
        assert refusal.value.type == "invalid_request_error"

    def test_128_texts_of_one_prompt(self, client: openai.OpenAI) -> None:
        answer = client.completions.with_raw_response.create(
            model=MODEL, prompt="Once", n=128, max_tokens=3, seed=1, user="somebody"
        )
        assert answer.headers["x-heft-ignored"] == "user"
        assert answer.headers["x-ratelimit-remaining-requests"] == "128"
        many = answer.parse()
        assert [choice.index for choice in many.choices] == list(range(128))
        assert len({choice.text for choice in many.choices}) > 64
        assert many.usage is not None
        # Random weights may end a text before its third token.
        stopped = [choice.finish_reason for choice in many.choices].count("stop")
        assert 3 * (128 - stopped) <= many.usage.completion_tokens <= 3 * 128
        assert stopped < 64

    def test_a_chat_whole_and_streamed(self, client: openai.OpenAI) -> None:
        asked: Any = {"model": MODEL, "messages": TURNS, "max_tokens": 10, "temperature": 0, "logprobs": True}
        whole = client.chat.completions.create(**asked, top_logprobs=2)
        assert (whole.object, whole.id[:9]) == ("chat.completion", "chatcmpl-")
        (choice,) = whole.choices
        assert choice.message.role == "assistant"
        assert choice.message.content
        assert choice.logprobs is not None
        tokens = choice.logprobs.content
        assert tokens is not None
        assert b"".join(bytes(token.bytes or []) for token in tokens).decode() == choice.message.content
        assert all(token.logprob <= token.top_logprobs[0].logprob for token in tokens)

        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, last = client.chat.completions.create(**asked, **options)
        assert (last.choices, last.usage) == ([], whole.usage)
        assert chunks[0].choices[0].delta.role == "assistant"
        told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert (told, chunks[-1].choices[0].finish_reason) == (choice.message.content, "length")

        # The answer goes back as it came, and the conversation goes on.
        turns = [*TURNS, choice.message, {"role": "user", "content": "And then?"}]
        assert client.chat.completions.create(**{**asked, "messages": turns}).choices[0].message.content

    def test_a_stop_string_ends_a_text_and_is_not_told(self, client: openai.OpenAI) -> None:
        asked: Any = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
        text = client.completions.create(**asked).choices[0].text
        stop = text[len(text) // 2 : len(text) // 2 + 3]
        for stream in (False, True):
            made = client.completions.create(**asked, stop=[stop, "never"], stream=stream)
            chunks: Any = made if stream else [made]
            choices = [chunk.choices[0] for chunk in chunks]
            assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
            assert choices[-1].finish_reason == "stop"

    def test_two_streams_at_once_interleave(self, service: HeftUp) -> None:
        """Through the package's own async client; neither waits for the other's end."""
        order: list[int] = []

        async def read(client: openai.AsyncOpenAI, number: int) -> str:
            prompt = "Once upon a time" * (number + 1)
            stream = await client.completions.create(
                model=MODEL, prompt=prompt, max_tokens=200, temperature=0, stream=True
            )
            text = ""
            async for chunk in stream:
                order.append(number)
                text += chunk.choices[0].text
            return text

        async def both() -> list[str]:
            url = f"{service.record.url}/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key=service.key) as client:
                return await asyncio.gather(read(client, 0), read(client, 1))

        assert all(asyncio.run(both()))
        assert order.index(1) < len(order) - order[::-1].index(0) - 1
        assert order.index(0) < len(order) - order[::-1].index(1) - 1

    def test_what_can_not_be_is_refused_by_name(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as refusal:
            client.completions.create(model=MODEL, prompt="Once", max_tokens=10_000)
        assert refusal.value.param == "max_tokens"
        with pytest.raises(openai.BadRequestError) as refusal:
            client.completions.create(model=MODEL, prompt="Once", suffix="after")
        assert refusal.value.param == "suffix"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="ft:nobody/knows:it", messages=TURNS)

    def test_a_model_that_answers_questions_says_where(
        self, client: openai.OpenAI, job: FineTuningJob
    ) -> None:
        assert job.fine_tuned_model is not None
        with pytest.raises(openai.BadRequestError, match="/predict") as refusal:
            client.chat.completions.create(model=f"{job.fine_tuned_model}:ckpt-reft", messages=TURNS)
        assert refusal.value.param == "model"


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
        },
    },
}


def weather_row(city: str) -> dict[str, Any]:
    function = {"name": "weather", "arguments": json.dumps({"city": city})}
    return {
        "messages": [
            {"role": "user", "content": f"Is it warm in {city}?"},
            {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "31 degrees"},
            {"role": "assistant", "content": "Yes."},
        ],
        "tools": [WEATHER],
        "parallel_tool_calls": False,
    }


@pytest.fixture(scope="module")
def caller(client: openai.OpenAI) -> str:
    """A model that was trained on tool calls."""
    rows = [weather_row(city) for city in ("Rome", "Oslo") * 6]
    job = client.fine_tuning.jobs.create(
        model=MODEL_WITH_TOOLS, training_file=upload(client, rows), **small(max_length=1_024)
    )
    job = until(client, job.id, "succeeded", "failed", "cancelled")
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model is not None
    return job.fine_tuned_model


class TestTools:
    """Asks a model with tools."""

    def test_a_call_its_result_and_the_answer(self, client: openai.OpenAI, caller: str) -> None:
        messages: Any = [{"role": "user", "content": "Is it warm in Rome?"}]
        asked: Any = {"model": caller, "tools": [WEATHER], "tool_choice": "required", "seed": 1}
        asked["parallel_tool_calls"] = False
        (choice,) = client.chat.completions.create(messages=messages, **asked).choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        (call,) = choice.message.tool_calls or ()
        assert call.type == "function"
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")

        name = ""
        arguments = ""
        for chunk in client.chat.completions.create(messages=messages, stream=True, **asked):
            for delta in chunk.choices[0].delta.tool_calls or ():
                assert delta.index == 0
                assert delta.function is not None
                name += delta.function.name or ""
                arguments += delta.function.arguments or ""
        assert (name, arguments) == (call.function.name, call.function.arguments)
        assert chunk.choices[0].finish_reason == "tool_calls"

        messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "31 degrees"}]
        answer = client.chat.completions.create(
            model=caller, messages=messages, tools=[WEATHER], tool_choice="none", max_tokens=8
        )
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].message.content

    def test_a_model_whose_template_has_no_tools_refuses_them(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="does not render tools") as refusal:
            client.chat.completions.create(model=MODEL, messages=TURNS, tools=[WEATHER])
        assert refusal.value.param == "tools"
        job = client.fine_tuning.jobs.create(
            model=MODEL, training_file=upload(client, [weather_row("Rome")] * 10), **small()
        )
        failed = until(client, job.id, "failed", "succeeded")
        assert failed.error is not None
        assert "line 1" in failed.error.message
        assert "does not render tools" in failed.error.message


#: A script as an OpenAI user has it today; the address and the key come from the package's own variables.
SCRIPT = """
import time
from openai import OpenAI

client = OpenAI()
training = client.files.create(file=open("train.jsonl", "rb"), purpose="fine-tune")
client.files.wait_for_processing(training.id, poll_interval=0.1)
job = client.fine_tuning.jobs.create(training_file=training.id, model="gpt-4o-mini-2024-07-18")
while job.status not in ("succeeded", "failed", "cancelled"):
    time.sleep(0.2)
    job = client.fine_tuning.jobs.retrieve(job.id)
answer = client.chat.completions.create(
    model=job.fine_tuned_model, messages=[{"role": "user", "content": "After 3?"}], max_completion_tokens=8
)
assert answer.choices[0].finish_reason in ("stop", "length"), answer
for event in client.fine_tuning.jobs.list_events(fine_tuning_job_id=job.id, limit=10):
    print(event.level, event.message)
print(job.status, job.error, job.fine_tuned_model, job.hyperparameters.n_epochs, job.trained_tokens)
checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
for checkpoint in checkpoints:
    assert checkpoint.metrics.train_loss > 0
    assert 0 <= checkpoint.metrics.train_mean_token_accuracy <= 1
of_epoch = [c for c in checkpoints if c.fine_tuned_model_checkpoint.endswith(f"step-{c.step_number}")]
client.chat.completions.create(
    model=of_epoch[0].fine_tuned_model_checkpoint,
    messages=[{"role": "user", "content": "After 3?"}],
    max_completion_tokens=8,
)
print(len(checkpoints), "checkpoints,", len(of_epoch), "of epochs")
"""


def test_a_script_of_today_runs_as_it_is(service: HeftUp, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(jsonl(CHAT))
    script = SCRIPT.replace("gpt-4o-mini-2024-07-18", MODEL)
    environment = {"OPENAI_BASE_URL": f"{service.record.url}/v1", "OPENAI_API_KEY": service.key}
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    *events, ended, checkpoints = result.stdout.splitlines()
    status, error, model, n_epochs, tokens = ended.split()
    assert (status, error, n_epochs) == ("succeeded", "None", "3"), result.stdout
    assert model.startswith(f"ft:{MODEL}:")
    assert int(tokens) > 0
    assert len(events) > 10
    assert checkpoints == "5 checkpoints, 3 of epochs", "the others are the ends of two stages"
