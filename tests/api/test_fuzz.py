"""Random requests to create jobs, to predict and for text: a success or an error in OpenAI's format, never a 500."""

from __future__ import annotations

import json
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.schemas.jobs import JobRequest
from api.schemas.predict import PredictRequest

FAST = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

#: All text, including lone surrogates and NUL: json.dumps escapes them.
TEXT = st.text(st.characters(), max_size=12) | st.sampled_from(
    ["auto", "heft", "\0", "\ud800", "../x", "ft:"]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | TEXT
    | st.sampled_from(["lora", "reft", "recipe", "supervised", "yes_no", "choice", "text", "sample:passages"])
)
KEYS = (
    TEXT
    | st.sampled_from(sorted(JobRequest.model_fields))
    | st.sampled_from(sorted(PredictRequest.model_fields))
    | st.sampled_from(
        ["lora", "reft", "heft", "recipe", "stages", "type", "rank", "layers", "n_epochs", "labels"]
    )
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)
STAGE = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("rank", "layers", "n_epochs", "learning_rate", "positions", "type"), VALUES),
)
METHOD = st.fixed_dictionaries(
    {"type": st.sampled_from(["heft", "lora", "reft", "recipe", "supervised"]) | SCALARS},
    optional={
        "lora": STAGE,
        "heft": st.fixed_dictionaries({}, optional={"lora": STAGE, "reft": STAGE}) | VALUES,
        "recipe": st.fixed_dictionaries({"stages": st.lists(STAGE, max_size=3)}) | VALUES,
        "supervised": VALUES,
    },
)
NEARLY_A_JOB = st.fixed_dictionaries(
    {"model": st.just("smollm2-135m") | VALUES, "training_file": st.just("sample:passages") | VALUES},
    optional={
        name: VALUES for name in JobRequest.model_fields if name not in ("model", "training_file", "method")
    }
    | {"method": METHOD},
)
ROW = st.dictionaries(st.sampled_from(["question", "passage", "choices", "prompt", "messages"]), VALUES)
NEARLY_A_QUESTION = st.fixed_dictionaries(
    {"model": st.just("no-such-model") | VALUES},
    optional={
        "question": VALUES,
        "messages": VALUES,
        "inputs": st.lists(ROW) | VALUES,
        "intervention": VALUES,
    },
)

#: Of a model that does not exist, so that nothing is sent to a worker.
NEARLY_A_PROMPT = st.fixed_dictionaries(
    {"model": st.just("no-such-model") | VALUES},
    optional={
        "prompt": VALUES,
        "messages": st.lists(ROW, max_size=3)
        | st.lists(
            st.fixed_dictionaries({"role": st.just("user"), "content": VALUES}, optional={"name": VALUES})
        )
        | VALUES,
        **dict.fromkeys(("n", "stop", "store", "tools", "logit_bias", "stream_options", "seed"), VALUES),
    }
    | dict.fromkeys(("user", "metadata", "odd\r\n", "\U0001f600"), VALUES),
)


def judge(answer: httpx.Response) -> None:
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}


@FAST
@given(body=NEARLY_A_JOB | VALUES)
def test_jobs(client: httpx.Client, body: Any) -> None:
    judge(
        client.post(
            "/v1/fine_tuning/jobs", content=json.dumps(body), headers={"Content-Type": "application/json"}
        )
    )


@FAST
@given(body=NEARLY_A_QUESTION | VALUES)
def test_questions(client: httpx.Client, body: Any) -> None:
    judge(client.post("/predict", content=json.dumps(body), headers={"Content-Type": "application/json"}))


@FAST
@given(path=st.sampled_from(["/v1/completions", "/v1/chat/completions"]), body=NEARLY_A_PROMPT | VALUES)
def test_prompts(client: httpx.Client, path: str, body: Any) -> None:
    answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    judge(answer)
    assert len(answer.headers.get("x-heft-ignored", "")) <= 1_000


@FAST
@given(
    path=st.sampled_from(
        ["/v1/files", "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/x/events", "/v1/models/x"]
    ),
    query=st.dictionaries(
        st.sampled_from(["limit", "after", "order", "purpose", "metadata[k]", "metadata[\ud7ff]", "stream"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.integers().map(str),
    ),
)
def test_queries(client: httpx.Client, path: str, query: dict[str, str]) -> None:
    judge(client.get(path, params=query))


@FAST
@given(
    body=st.binary(max_size=200),
    kind=st.sampled_from(["application/json", "multipart/form-data; boundary=b"]),
)
def test_bytes(client: httpx.Client, body: bytes, kind: str) -> None:
    for path in ("/v1/fine_tuning/jobs", "/predict"):
        if kind == "application/json":
            judge(client.post(path, content=body, headers={"Content-Type": kind}))
    judge(client.post("/v1/files", content=body, headers={"Content-Type": kind}))
