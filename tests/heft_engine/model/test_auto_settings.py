"""What settings may be, what "auto" means for a model, and how an evaluation counts."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from heft_engine.config.train import LoraStage, ReftStage, TaskSettings, TrainConfig, parse_positions, recipe
from heft_engine.errors import ConfigError
from heft_engine.evaluation.evaluate import Evaluation
from heft_engine.model.auto_settings import auto_layer, auto_learning_rate, resolve_max_length, resolve_stage
from heft_engine.model.families import FAMILIES

SMOLLM2, LLAMA_2_7B = 134_515_008, 6_738_415_616


def resolved(stage: LoraStage | ReftStage, family: str = "llama", **sizes: int) -> Any:
    whole = {"n_layers": 32, "hidden_size": 4_096, "parameters": LLAMA_2_7B, **sizes}
    return resolve_stage(stage, FAMILIES[family], **whole)


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


def test_auto_is_the_papers_setting_at_the_papers_size() -> None:
    lora, reft = resolved(LoraStage()), resolved(ReftStage())
    assert (lora.learning_rate, lora.target_modules, lora.layers) == (2e-4, ["q_proj", "v_proj"], None)
    assert (reft.learning_rate, reft.layers, reft.rank, reft.positions) == (2e-4, [15], 4, "l1")
    assert (LoraStage().rank, LoraStage().alpha, LoraStage().n_epochs) == (8, 32, 3)


def test_auto_learns_faster_on_small_models_within_bounds() -> None:
    assert [auto_learning_rate(kind, SMOLLM2) for kind in ("lora", "reft")] == [5e-4, 2e-3]
    for kind in ("lora", "reft"):
        rates = [auto_learning_rate(kind, 10**n) for n in range(3, 13)]
        assert rates == sorted(rates, reverse=True)
        assert rates[0] <= 2e-2
        assert rates[-1] >= 1e-4


def test_a_multiplier_scales_the_automatic_rate_and_is_used_up() -> None:
    stage = resolved(ReftStage(learning_rate_multiplier=3))
    assert stage.learning_rate == pytest.approx(6e-4)
    assert resolved(stage) == stage


@pytest.mark.parametrize(("n_layers", "layer"), [(32, 15), (30, 14), (4, 2), (2, 1), (1, 0)])
def test_the_automatic_layer_is_the_papers_depth(n_layers: int, layer: int) -> None:
    assert auto_layer(n_layers) == layer


def test_the_automatic_modules_are_the_familys_own() -> None:
    assert resolved(LoraStage(), "gpt_neox").target_modules == ["query_key_value"]
    assert resolved(LoraStage(target_modules=["o_proj"])).target_modules == ["o_proj"]


@pytest.mark.parametrize(
    ("stage", "param"),
    [
        (ReftStage(layers=[3, 32]), "reft.layers"),
        (LoraStage(layers=[32]), "lora.layers"),
        (ReftStage(rank=513), "reft.rank"),
    ],
)
def test_what_the_model_does_not_have_is_refused(stage: Any, param: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolved(stage, hidden_size=512)
    assert refused.value.param == param


def test_a_rows_length_is_what_the_model_takes() -> None:
    assert resolve_max_length(None, 8_192) == 2_048
    assert resolve_max_length(None, 512) == 512
    assert resolve_max_length(8_192, 8_192) == 8_192
    with pytest.raises(ConfigError, match="takes 512 tokens"):
        resolve_max_length(513, 512)


def test_labels_belong_to_choice_and_differ() -> None:
    for wrong in ({"type": "text", "labels": ["a", "b"]}, {"labels": ["a", "a"]}, {"labels": ["a"]}):
        with pytest.raises(ValidationError):
            TaskSettings(**wrong)  # type: ignore[arg-type]


def test_a_config_survives_its_json() -> None:
    config = TrainConfig(
        model="m", method="heft", stages=recipe("heft"), task=TaskSettings(labels=["a", "b"])
    )
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


def test_an_evaluation_has_wilsons_interval() -> None:
    # Wilson score, z = 1.96: the textbook's 8 of 10.
    result = Evaluation.of([True] * 8 + [False] * 2)
    assert (result.n, result.correct, result.accuracy) == (10, 8, 0.8)
    assert result.interval_95 == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Evaluation.of([True] * 5).interval_95[1] == 1.0
