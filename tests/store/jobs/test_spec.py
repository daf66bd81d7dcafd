"""TrainingSpec: OpenAI's way of writing a method, the service's own, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from store.jobs.spec import TrainingSpec


def spec(**changes: Any) -> TrainingSpec:
    return TrainingSpec.model_validate(
        {"model": "smollm2-135m", "training_file": "file-abc", "seed": 1} | changes
    )


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        ({}, ["lora", "reft"]),
        ({"type": "heft"}, ["lora", "reft"]),
        ({"type": "supervised"}, ["lora", "reft"]),
        ({"type": "lora"}, ["lora"]),
        ({"type": "reft"}, ["reft"]),
        ({"type": "heft_reversed"}, ["reft", "lora"]),
        ({"type": "heft_interleaved"}, ["lora", "reft", "lora", "reft"]),
        ({"type": "recipe", "recipe": {"stages": [{"type": "reft"}, {"type": "reft"}]}}, ["reft", "reft"]),
    ],
)
def test_every_method_is_a_list_of_stages(method: dict[str, Any], stages: list[str]) -> None:
    assert [stage.type for stage in spec(method=method).stages()] == stages


def test_openais_hyperparameters_go_to_every_stage() -> None:
    hyperparameters = {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5}
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    for stage in spec(method=method).stages():
        assert (stage.n_epochs, stage.batch_size, stage.learning_rate_multiplier) == (2, 16, 0.5)
        assert stage.learning_rate == "auto"


def test_what_is_stored_is_read_back_equal() -> None:
    full = spec(method={"type": "heft", "heft": {"lora": {"rank": 2}, "reft": {"layers": 3}}}, suffix="x")
    assert TrainingSpec.model_validate(full.model_dump(mode="json")) == full


@pytest.mark.parametrize(("stored", "read"), [({}, True), ({"reuse": True}, True), ({"reuse": False}, False)])
def test_jobs_of_every_age_say_whether_they_reuse(stored: dict[str, bool], read: bool) -> None:
    older = spec().model_dump(mode="json", exclude={"reuse"}) | stored
    assert TrainingSpec.model_validate(older).reuse is read


@pytest.mark.parametrize(
    "model", ["/etc", "../up", "~/m", "a/b/c", "http://x/y", "a#b", "a\x00", ".hidden", "a/..b"]
)
def test_a_path_is_no_model(model: str) -> None:
    with pytest.raises(ValidationError):
        spec(model=model)


@pytest.mark.parametrize("file", ["rows.jsonl", "/etc/passwd", "file-", "hub:../x", "sample:UP", "file-a/b"])
def test_a_path_is_no_file(file: str) -> None:
    with pytest.raises(ValidationError):
        spec(training_file=file)


@pytest.mark.parametrize(
    "method",
    [
        {"type": "lora", "reft": {}},
        {"type": "recipe"},
        {"type": "heft", "heft": {"lora": {"rank": 0}}},
        {"type": "heft", "heft": {"lora": {"rnak": 8}}},
        {"type": "dpo"},
    ],
)
def test_a_method_that_cannot_be_is_refused(method: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        spec(method=method)
