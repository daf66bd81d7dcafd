"""Settings of a run: valid values, and messages for others."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from heft_engine.config.train import LoraStage, ReftStage, TaskSettings, TrainConfig, parse_positions, recipe


@pytest.mark.parametrize(
    ("method", "kinds"),
    [
        ("heft", ["lora", "reft"]),
        ("lora", ["lora"]),
        ("reft", ["reft"]),
        ("heft_reversed", ["reft", "lora"]),
        ("heft_interleaved", ["lora", "reft", "lora", "reft"]),
    ],
)
def test_a_method_is_a_list_of_stages(method: Any, kinds: list[str]) -> None:
    assert [stage.type for stage in recipe(method)] == kinds
    assert recipe(method, lora=LoraStage(rank=3), reft=ReftStage(rank=3))[0].rank == 3


def test_a_recipe_has_no_list_of_its_own() -> None:
    with pytest.raises(ValueError, match="no fixed list"):
        recipe("recipe")


@pytest.mark.parametrize(
    ("positions", "parts"), [("l1", (0, 1)), ("f1", (1, 0)), ("f1+l1", (1, 1)), ("f12+l300", (12, 300))]
)
def test_positions_are_written_as_in_pyreft(positions: str, parts: tuple[int, int]) -> None:
    assert parse_positions(positions) == parts


@pytest.mark.parametrize(
    "wrong", ["", "+", "f0", "l0", "f1l1", "f1+", "+l1", "l1+f1", "f1+l1+l2", "x1", "f1000", "l1\n"]
)
def test_other_positions_are_refused(wrong: str) -> None:
    with pytest.raises(ValidationError, match="positions must have the form f1, l1 or f1"):
        ReftStage(positions=wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "greater than or equal to 1"),
        ({"rnak": 4}, "Extra inputs"),
        ({"learning_rate": float("nan")}, "finite number"),
        ({"learning_rate": 0}, "greater than 0"),
        ({"learning_rate": 1e-3, "learning_rate_multiplier": 2}, "not both"),
        ({"n_epochs": 0}, "greater than or equal to 1"),
        ({"dropout": 1.0}, "less than 1"),
        ({"layers": []}, "at least 1"),
        ({"layers": [-1]}, "greater than or equal to 0"),
    ],
)
@pytest.mark.parametrize("kind", [LoraStage, ReftStage])
def test_settings_have_bounds(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        kind(**settings)


def test_labels_belong_to_choice_and_differ() -> None:
    for wrong in ({"type": "text", "labels": ["a", "b"]}, {"labels": ["a", "a"]}, {"labels": ["a"]}):
        with pytest.raises(ValidationError):
            TaskSettings(**wrong)  # type: ignore[arg-type]


def test_a_config_survives_its_json() -> None:
    config = TrainConfig(
        model="m", method="heft", stages=recipe("heft"), task=TaskSettings(labels=["a", "b"])
    )
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config
