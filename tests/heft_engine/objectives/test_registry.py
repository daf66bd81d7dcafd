"""A stage's objective: named in its settings, supervised by default."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from heft_engine.config.train import LoraStage, ReftStage, SupervisedSettings
from heft_engine.objectives.registry import create
from heft_engine.objectives.supervised import SupervisedObjective


@pytest.mark.parametrize("stage", [LoraStage, ReftStage])
def test_it_is_the_default_of_every_stage_and_stays_out_of_its_dump(
    stage: type[LoraStage] | type[ReftStage],
) -> None:
    named = stage.model_validate({"objective": {"type": "supervised"}})
    assert named == stage()
    assert "objective" not in named.model_dump() | named.model_dump(mode="json")
    assert isinstance(create(named.objective), SupervisedObjective)
    assert named.objective == SupervisedSettings()
    with pytest.raises(ValidationError) as refused:
        stage.model_validate({"objective": {"type": "unknown"}})
    assert refused.value.errors()[0]["loc"] == ("objective", "type")
