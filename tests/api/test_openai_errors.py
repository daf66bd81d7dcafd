"""Errors as the unmodified `openai` package raises them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import httpx
import openai
import pytest
from api_calls import MINIMAL, create
from fastapi import FastAPI

from api.app import create_app
from store.settings import StoreSettings

CHAT = {"model": "nobody/knows-it", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def package(client: httpx.Client) -> Iterator[openai.OpenAI]:
    key = client.headers["authorization"].removeprefix("Bearer ")
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key=key, max_retries=0) as package:
        yield package


def facts(error: openai.APIError) -> tuple[str | None, str | None, str | None]:
    return error.type, error.code, error.param


def test_an_invalid_value_is_a_bad_request(package: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as job:
        package.fine_tuning.jobs.create(model="m", training_file="sample:passages", seed=-1)
    assert facts(job.value) == ("invalid_request_error", "invalid_value", "seed")
    with pytest.raises(openai.BadRequestError) as chat:
        package.chat.completions.create(**CHAT, temperature=9)  # type: ignore[call-overload]
    assert facts(chat.value) == ("invalid_request_error", "invalid_value", "temperature")
    with pytest.raises(openai.BadRequestError) as page:
        package.fine_tuning.jobs.list(limit=0)
    assert page.value.param == "limit"


@pytest.mark.parametrize("key", ["sk-somebody-elses-key", "short"])
def test_a_wrong_key_is_an_authentication_error(url: str, key: str) -> None:
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as package,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        package.models.list()
    assert facts(refused.value) == ("invalid_request_error", "invalid_api_key", None)


def test_an_unknown_id_is_not_found(package: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as job:
        package.fine_tuning.jobs.retrieve("ftjob-nobody")
    assert facts(job.value)[:2] == ("invalid_request_error", None)
    with pytest.raises(openai.NotFoundError) as file:
        package.files.retrieve("file-nobody")
    assert facts(file.value)[:2] == ("invalid_request_error", None)
    with pytest.raises(openai.NotFoundError) as model:
        package.models.retrieve("nobody/knows-it")
    assert facts(model.value) == ("invalid_request_error", "model_not_found", "model")
    with pytest.raises(openai.NotFoundError) as chat:
        package.chat.completions.create(**CHAT)  # type: ignore[call-overload]
    assert facts(chat.value) == ("invalid_request_error", "model_not_found", "model")
    with pytest.raises(openai.NotFoundError) as path:
        package.get("/nothing", cast_to=object)
    assert facts(path.value) == ("invalid_request_error", None, None)


def test_a_job_that_has_ended_can_not_be_cancelled(package: openai.OpenAI, client: httpx.Client) -> None:
    job_id = create(client)["id"]
    assert package.fine_tuning.jobs.cancel(job_id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="already ended") as refused:
        package.fine_tuning.jobs.cancel(job_id)
    assert refused.value.type == "invalid_request_error"


def test_only_a_reused_idempotency_key_is_a_conflict(package: openai.OpenAI) -> None:
    header = {"Idempotency-Key": "once"}
    package.fine_tuning.jobs.create(**MINIMAL, extra_headers=header)
    with pytest.raises(openai.ConflictError) as refused:
        package.fine_tuning.jobs.create(**MINIMAL, seed=7, extra_headers=header)
    assert refused.value.code == "idempotency_key_reused"


def test_too_many_wrong_keys_are_a_rate_limit_error(
    settings: StoreSettings, serving: Callable[[FastAPI], AbstractContextManager[str]]
) -> None:
    app = create_app(settings.model_copy(update={"wrong_keys_per_minute": 2}))
    with serving(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x" * 20, max_retries=0) as package:
        for _ in range(2):
            with pytest.raises(openai.AuthenticationError):
                package.models.list()
        with pytest.raises(openai.RateLimitError) as refused:
            package.models.list()
    assert refused.value.code == "rate_limit_exceeded"
    headers = refused.value.response.headers
    assert headers["x-ratelimit-limit-requests"] == "2"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-reset-requests"] == f"{headers['retry-after']}s"
