"""What a study asks for, and what is refused by the field's name before anything is queued."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from store import presets
from store.errors import InvalidRequest
from store.study_arms import BaseFacts, PlannedArm
from store.study_plan import plan
from store.study_spec import StudySpec

BASE = BaseFacts(n_layers=30, hidden_size=576)


def spec(**changes: Any) -> StudySpec:
    given = {"name": "s", "model": "smollm2-135m", "training_file": "file-a", "test_file": "file-b"}
    return StudySpec.model_validate(given | changes)


def arms(base: BaseFacts | None = BASE, **changes: Any) -> list[PlannedArm]:
    return plan(spec(**changes).completed(), base)


def refused(base: BaseFacts | None = BASE, **changes: Any) -> str | None:
    with pytest.raises(InvalidRequest) as found:
        arms(base, **changes)
    return found.value.param


def stages(arm: PlannedArm) -> list[tuple[str, int]]:
    return [(stage.type, stage.n_epochs) for stage in arm.spec.stages()]


def test_a_grid_is_every_combination() -> None:
    found = arms(grid={"reft.layers": [10, 15, 20], "reft.rank": [2, 4, 8]})
    assert [arm.name for arm in found][:4] == [
        "reft.layers=10 reft.rank=2",
        "reft.layers=10 reft.rank=4",
        "reft.layers=10 reft.rank=8",
        "reft.layers=15 reft.rank=2",
    ]
    settings = [(arm.spec.stages()[1].layers, arm.spec.stages()[1].rank) for arm in found]
    assert settings == [([layer], rank) for layer in (10, 15, 20) for rank in (2, 4, 8)]


def test_a_grid_varies_the_studys_method() -> None:
    found = arms(method={"type": "lora", "lora": {"n_epochs": 5}}, grid={"lora.rank": [4, 8]})
    assert [(stages(arm), arm.spec.stages()[0].rank) for arm in found] == [
        ([("lora", 5)], 4),
        ([("lora", 5)], 8),
    ]


def test_a_grid_reaches_the_stages_of_a_recipe_and_settings_of_the_job() -> None:
    recipe = {"type": "recipe", "recipe": {"stages": [{"type": "reft"}, {"type": "reft"}]}}
    found = arms(method=recipe, grid={"stages.1.rank": [2], "max_length": [64, 128]})
    assert [arm.spec.max_length for arm in found] == [64, 128]
    assert [stage.rank for stage in found[0].spec.stages()] == [4, 2]


def test_an_arm_changes_a_few_settings() -> None:
    own = {"type": "reft", "reft": {"n_epochs": 7}}
    found = arms(arms=[{"name": "a", "set": {"lora.rank": 2}}, {"name": "b", "method": own}])
    assert [stages(arm) for arm in found] == [[("lora", 3), ("reft", 3)], [("reft", 7)]]
    assert found[0].spec.stages()[0].rank == 2


def test_a_budget_draws_from_the_grid_the_same_ones_each_time() -> None:
    grid = {"reft.rank": list(range(1, 101)), "lora.rank": list(range(1, 101))}
    drawn = [arm.name for arm in arms(grid=grid, budget=20)]
    assert len(set(drawn)) == 20
    assert drawn == [arm.name for arm in arms(grid=grid, budget=20)]
    assert drawn != [arm.name for arm in arms(grid=grid, budget=20, seeds=[7, 8])]


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("grid", {"grid": {"reft.rank": list(range(1, 101)), "lora.rank": list(range(1, 101))}}),
        ("grid", {"grid": {f"reft.{name}": list(range(10)) for name in "abcdefghijklmnopqrst"}, "budget": 5}),
        ("baseline", {"grid": {"reft.rank": list(range(1, 22))}, "seeds": [1]}),
        ("grid.reft.rank", {"grid": {"reft.rank": []}}),
        ("grid.reft.rank", {"grid": {"reft.rank": [4, 0]}}),
        ("grid.reft.nothing", {"grid": {"reft.nothing": [4]}}),
        ("grid.nothing", {"grid": {"nothing": [4]}}),
        ("grid.reft.rank.deep", {"grid": {"reft.rank.deep": [4]}}),
        ("grid.reft.layers", {"grid": {"reft.layers": [3, 30]}}),
        ("grid.reft.rank", {"grid": {"reft.rank": [577]}}),
        ("grid", {"grid": {"reft.rank": [4, 4]}}),
        ("arms[1].name", {"arms": [{"name": "a"}, {"name": "a", "set": {"reft.rank": 2}}]}),
        ("arms[0].set.lora.rank", {"arms": [{"name": "a", "set": {"lora.rank": "many"}}]}),
        (
            "arms[0].method.reft.layers",
            {"arms": [{"name": "a", "method": {"type": "reft", "reft": {"layers": 40}}}]},
        ),
        ("baseline", {"arms": [{"name": "a"}], "baseline": "b"}),
        ("seeds", {"grid": {"reft.rank": list(range(1, 101))}, "seeds": list(range(4))}),
        ("test_file", {"arms": [{"name": "a"}], "test_file": None}),
        ("model", {"arms": [{"name": "a"}], "model": None}),
        ("training_file", {"arms": [{"name": "a"}], "training_file": "/etc/passwd"}),
        ("epochs_scale", {"preset": "paper_table", "epochs_scale": 0.01}),
    ],
)
def test_what_can_not_be_is_refused_by_its_name(field: str, changes: dict[str, Any]) -> None:
    assert refused(**changes) == field


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grid": {}},
        {"grid": {"reft.rank": [1]}, "preset": "order"},
        {"preset": "nonsense"},
        {"arms": []},
        {"arms": [{"name": "a", "rank": 3}]},
        {"arms": [{"name": "a"}], "seeds": []},
        {"arms": [{"name": "a"}], "seeds": [1, 1]},
        {"arms": [{"name": "a"}], "epochs_scale": 0.5},
        {"arms": [{"name": "a"}], "budget": 3},
    ],
)
def test_a_request_of_the_wrong_form_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        spec(**changes)


# -- presets ----------------------------------------------------------------------------------------------------------


def test_the_papers_table_is_the_papers_own_run() -> None:
    asked = StudySpec(name="paper", preset="paper_table").completed()
    assert asked.model == "meta-llama/Llama-2-7b-hf"
    assert (asked.training_file, asked.test_file) == ("hub:google/boolq:train", "hub:google/boolq:validation")
    found = {arm.name: stages(arm) for arm in plan(asked)}
    assert found == {
        "LoRA alone 20": [("lora", 20)],
        "ReFT alone 20": [("reft", 20)],
        "HEFT 3+3": [("lora", 3), ("reft", 3)],
        "HEFT 20+20": [("lora", 20), ("reft", 20)],
    }


def test_a_preset_is_scaled_and_put_on_other_data() -> None:
    found = {arm.name: stages(arm) for arm in arms(preset="paper_table", epochs_scale=0.3)}
    assert found["HEFT 1+1"] == [("lora", 1), ("reft", 1)]
    assert found["HEFT 6+6"] == [("lora", 6), ("reft", 6)]


def test_every_order_sees_as_many_epochs() -> None:
    found = arms(preset="order", epochs_scale=2)
    assert [[type for type, _ in stages(arm)] for arm in found] == [
        ["lora", "reft"],
        ["reft", "lora"],
        ["lora", "reft", "lora", "reft"],
    ]
    assert {sum(epochs for _, epochs in stages(arm)) for arm in found} == {12}


def test_layers_and_ranks_follow_the_models_depth() -> None:
    found = [arm.spec.stages()[1] for arm in arms(preset="layer_rank")]
    assert sorted({(stage.layers[0], stage.rank) for stage in found}) == [
        (layer, rank) for layer in (9, 14, 19) for rank in (2, 4, 8)
    ]
    assert refused(base=None, preset="layer_rank") == "preset"


def test_variants_of_stage_1_are_arms_of_their_own() -> None:
    found = {arm.name: arm.spec.stages()[0] for arm in arms(preset="stage1_variants")}
    assert list(found) == ["LoRA", "rsLoRA", "DoRA", "PiSSA", "OLoRA", "DoRA + PiSSA"]
    assert (found["DoRA + PiSSA"].use_dora, found["DoRA + PiSSA"].init) == (True, "pissa")


def test_kinds_of_stage_2_are_those_that_the_engine_has() -> None:
    kinds = presets.stage2_kinds()
    assert len(kinds) > 1
    assert [arm.spec.stages()[1].kind for arm in arms(preset="stage2_variants")] == list(kinds)
