"""/openapi.json: every route with its parameters, responses and errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openapi_spec_validator import validate


@pytest.fixture(scope="module")
def described(url: str) -> dict[str, Any]:
    return dict(httpx.get(f"{url}/openapi.json").json())


def operations(described: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    }


def test_the_schema_is_valid(described: dict[str, Any]) -> None:
    validate(described)


def test_every_route_of_the_contract_exists(described: dict[str, Any]) -> None:
    jobs = "/v1/fine_tuning/jobs"
    assert set(operations(described)) == {
        "POST /v1/files",
        "GET /v1/files",
        "GET /v1/files/{file_id}",
        "DELETE /v1/files/{file_id}",
        "GET /v1/files/{file_id}/content",
        f"POST {jobs}",
        f"GET {jobs}",
        f"GET {jobs}/{{job_id}}",
        f"POST {jobs}/{{job_id}}/cancel",
        f"POST {jobs}/{{job_id}}/pause",
        f"POST {jobs}/{{job_id}}/resume",
        f"GET {jobs}/{{job_id}}/events",
        f"GET {jobs}/{{job_id}}/checkpoints",
        "POST /v1/studies",
        "GET /v1/studies",
        "GET /v1/studies/{study_id}",
        "POST /v1/studies/{study_id}/cancel",
        "GET /v1/studies/{study_id}/events",
        f"GET {jobs}/{{job_id}}/diagnostics",
        "GET /v1/models",
        "GET /v1/models/{model_id}",
        "DELETE /v1/models/{model_id}",
        "GET /v1/models/{model_id}/export",
        "POST /predict",
        "POST /v1/completions",
        "POST /v1/chat/completions",
        "GET /healthz",
        "GET /readyz",
        "GET /metrics",
    }


def test_each_route_documents_openais_error_object(described: dict[str, Any]) -> None:
    for operation in operations(described).values():
        shape = operation["responses"]["default"]["content"]["application/json"]["schema"]
        assert shape == {"$ref": "#/components/schemas/ErrorBody"}
        assert "422" not in operation["responses"]  # FastAPI's own shape, which never leaves
    assert set(described["components"]["schemas"]["ErrorDetail"]["required"]) == {
        "message",
        "type",
        "param",
        "code",
    }
    assert "HTTPValidationError" not in described["components"]["schemas"]


def test_headers_of_answers_are_described(described: dict[str, Any]) -> None:
    for route in ("POST /predict", "POST /v1/completions", "POST /v1/chat/completions"):
        headers = operations(described)[route]["responses"]["200"]["headers"]
        assert "x-ratelimit-remaining-requests" in headers
        assert ("x-heft-ignored" in headers) == (route != "POST /predict")


def test_all_routes_but_health_need_a_key(described: dict[str, Any]) -> None:
    for name, operation in operations(described).items():
        assert bool(operation.get("security")) == (not name.endswith(("/healthz", "/readyz"))), name


def test_the_schema_of_a_job_has_every_setting(described: dict[str, Any]) -> None:
    schemas = described["components"]["schemas"]
    assert {"model", "training_file", "method", "task", "seed", "suffix"} <= schemas["JobRequest"][
        "properties"
    ].keys()
    assert schemas["JobRequest"]["required"] == ["model", "training_file"]
    assert {"rank", "layers", "positions", "learning_rate"} <= schemas["ReftStage"]["properties"].keys()


def test_each_route_has_a_description(described: dict[str, Any]) -> None:
    for name, operation in operations(described).items():
        assert operation.get("description"), name


#: Not ours to bound: `positions` has a form of its own, and modules are names in the model.
BOUNDED_ELSEWHERE = {"positions", "target_modules"}


def unbounded(schema: Any, schemas: dict[str, Any], path: str, seen: set[str]) -> Iterator[str]:
    """Yields the paths of lists, texts and objects of free names without a largest size."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name not in seen:
            seen.add(name)
            yield from unbounded(schemas[name], schemas, path, seen)
        return
    kind = schema.get("type")
    if kind == "array":
        if "maxItems" not in schema:
            yield path
        yield from unbounded(schema.get("items", {}), schemas, f"{path}[]", seen)
    if kind == "string" and not {"maxLength", "enum", "const", "pattern"} & schema.keys():
        yield path
    if kind == "object":
        more = schema.get("additionalProperties", True)
        if more and "maxProperties" not in schema:
            yield path
        if isinstance(more, dict):
            yield from unbounded(more, schemas, f"{path}.*", seen)
        for name, part in schema.get("properties", {}).items():
            if name not in BOUNDED_ELSEWHERE:
                yield from unbounded(part, schemas, f"{path}.{name}", seen)
    for alternative in [*schema.get("anyOf", ()), *schema.get("oneOf", ())]:
        yield from unbounded(alternative, schemas, path, seen)


def test_every_list_and_text_of_a_request_is_bounded(described: dict[str, Any]) -> None:
    schemas = described["components"]["schemas"]
    bodies = {
        name: operation["requestBody"]["content"]["application/json"]["schema"]
        for name, operation in operations(described).items()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    }
    assert len(bodies) >= 5
    seen: set[str] = set()
    assert [path for name, schema in bodies.items() for path in unbounded(schema, schemas, name, seen)] == []
    assert {"PredictRequest", "ConversationMessage", "ArmSpec", "ReftStage"} <= seen
