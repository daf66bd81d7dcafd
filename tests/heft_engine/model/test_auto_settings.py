"""Automatic settings of a model: learning rates, layers, modules, length."""

from __future__ import annotations

from typing import Any

import pytest

from heft_engine.config.train import LoraStage, ReftStage
from heft_engine.errors import ConfigError
from heft_engine.model.auto_settings import auto_layer, auto_learning_rate, resolve_max_length, resolve_stage
from heft_engine.model.families import FAMILIES

SMOLLM2, LLAMA_2_7B = 134_515_008, 6_738_415_616


def resolved(stage: LoraStage | ReftStage, family: str = "llama", **sizes: int) -> Any:
    whole = {"n_layers": 32, "hidden_size": 4_096, "parameters": LLAMA_2_7B, **sizes}
    return resolve_stage(stage, FAMILIES[family], **whole)


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
