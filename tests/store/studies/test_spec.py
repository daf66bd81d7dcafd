"""Settings of studies, their arms, and errors that name the request's field."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from pydantic import ValidationError

from heft_engine.config.search_space import MAX_CHOICES
from store.db.study_tables import Outcome, Study
from store.db.tables import Job
from store.errors import InvalidRequest
from store.studies import presets
from store.studies.arms import BaseModelInfo, PlannedArm, Trial
from store.studies.dotted_settings import RequestFields
from store.studies.plan import plan
from store.studies.search import (
    MAX_INITIAL_FAILURES,
    best,
    free_slots,
    stop_reason,
    trial_json,
    trials_of,
)
from store.studies.search_rounds import arms_with_results
from store.studies.spec import MAX_CHANGES, MAX_VALUE_CHARS, StudySpec
from store.studies.studies import Run

BASE = BaseModelInfo(n_layers=30, hidden_size=576)


def spec(**changes: Any) -> StudySpec:
    defaults = {"name": "s", "model": "smollm2-135m", "training_file": "file-a", "test_file": "file-b"}
    return StudySpec.model_validate(defaults | changes)


def arms(base: BaseModelInfo | None = BASE, **changes: Any) -> list[PlannedArm]:
    return plan(spec(**changes).completed(), base)


def refused(base: BaseModelInfo | None = BASE, **changes: Any) -> str | None:
    with pytest.raises(InvalidRequest) as refusal:
        arms(base, **changes)
    return refusal.value.param


SPACE = {"reft.rank": [2, 4, 8], "reft.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}}


def search(**changes: Any) -> dict[str, Any]:
    """Settings of a search, besides name and model."""
    return {"validation_file": "file-v", "search": {"space": SPACE, "budget": 10, **changes}}


def tasks(**changes: Any) -> dict[str, Any]:
    """Settings of cross_task, besides name and model."""
    task = {"training_file": "file-a", "test_file": "file-b"}
    named = [{"name": "boolq", **task}, {"name": "sst2", **task, "task": {"type": "choice"}, **changes}]
    return {"preset": "cross_task", "tasks": named, "training_file": None, "test_file": None}


def stages(arm: PlannedArm) -> list[tuple[str, int]]:
    return [(stage.type, stage.n_epochs) for stage in arm.spec.stages()]


def test_a_grid_is_every_combination() -> None:
    planned = arms(grid={"reft.layers": [10, 15, 20], "reft.rank": [2, 4, 8]})
    assert [arm.name for arm in planned][:4] == [
        "reft.layers=10 reft.rank=2",
        "reft.layers=10 reft.rank=4",
        "reft.layers=10 reft.rank=8",
        "reft.layers=15 reft.rank=2",
    ]
    settings = [(arm.spec.stages()[1].layers, arm.spec.stages()[1].rank) for arm in planned]
    assert settings == [([layer], rank) for layer in (10, 15, 20) for rank in (2, 4, 8)]


def test_a_grid_varies_the_studys_method() -> None:
    planned = arms(method={"type": "lora", "lora": {"n_epochs": 5}}, grid={"lora.rank": [4, 8]})
    assert [(stages(arm), arm.spec.stages()[0].rank) for arm in planned] == [
        ([("lora", 5)], 4),
        ([("lora", 5)], 8),
    ]


def test_a_grid_reaches_the_stages_of_a_recipe_and_settings_of_the_job() -> None:
    recipe = {"type": "recipe", "recipe": {"stages": [{"type": "reft"}, {"type": "reft"}]}}
    planned = arms(method=recipe, grid={"stages.1.rank": [2], "max_length": [64, 128]})
    assert [arm.spec.max_length for arm in planned] == [64, 128]
    assert [stage.rank for stage in planned[0].spec.stages()] == [4, 2]


def test_an_arm_changes_a_few_settings() -> None:
    reft = {"type": "reft", "reft": {"n_epochs": 7}}
    planned = arms(arms=[{"name": "a", "set": {"lora.rank": 2}}, {"name": "b", "method": reft}])
    assert [stages(arm) for arm in planned] == [[("lora", 3), ("reft", 3)], [("reft", 7)]]
    assert planned[0].spec.stages()[0].rank == 2


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
        ("validation_file", search() | {"validation_file": None}),
        ("test_file", search() | {"test_file": None}),
        ("test_file", search() | {"test_file": "file-v"}),
        ("search.budget", search(budget=101) | {"seeds": [1, 2, 3]}),
        ("search.budget", search(budget=100) | {"seeds": [1, 2, 3], "baseline": "as it is"}),
        ("baseline", search() | {"baseline": "trial 1"}),
        ("search.space.reft.nothing", search(space={"reft.nothing": [4]})),
        ("search.space.nothing", search(space={"nothing": [4]})),
        ("search.space.reft.rank.deep", search(space={"reft.rank.deep": [4]})),
        ("search.space.reft.rank", search(space={"reft.rank": [4, 0]})),
        ("search.space.reft.rank", search(space={"reft.rank": {"low": 1, "high": 2_000}})),
        ("search.space.reft.rank", search(space={"reft.rank": {"low": 1.0, "high": 8.5}})),
        ("search.space.reft.rank", search(space={"reft.rank": [4, 4]})),
        ("search.space.reft.layers", search(space={"reft.layers": [30, 31]})),
        (
            "search.space.reft.learning_rate",
            search(space={"reft.learning_rate": [1e-3, 1e-4]})
            | {"method": {"type": "heft", "heft": {"reft": {"learning_rate_multiplier": 2}}}},
        ),
        ("training_file", search() | {"training_file": "/etc/passwd"}),
        ("tasks[1].training_file", tasks(training_file="/etc/passwd")),
        ("tasks[1].test_file", tasks(test_file=None)),
        (
            "seeds",
            tasks()
            | {
                "seeds": list(range(50)),
                "tasks": [
                    {"name": str(i), "training_file": "file-a", "test_file": "file-b"} for i in range(3)
                ],
            },
        ),
        ("baseline", tasks() | {"baseline": "boolq"}),
        ("model", tasks() | {"model": None}),
    ],
)
def test_what_can_not_be_is_refused_by_its_name(field: str, changes: dict[str, Any]) -> None:
    assert refused(**changes) == field


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        ("arms", {}),
        ("grid", {"grid": {}}),
        ("preset", {"grid": {"reft.rank": [1]}, "preset": "order"}),
        ("search", {"grid": {"reft.rank": [1]}, **search()}),
        ("preset", {"preset": "order", **search()}),
        ("search", {"arms": [{"name": "a"}], **search()}),
        ("preset", {"preset": "nonsense"}),
        ("arms", {"arms": []}),
        ("arms.0.rank", {"arms": [{"name": "a", "rank": 3}]}),
        ("seeds", {"arms": [{"name": "a"}], "seeds": []}),
        ("seeds", {"arms": [{"name": "a"}], "seeds": [1, 1]}),
        ("epochs_scale", {"arms": [{"name": "a"}], "epochs_scale": 0.5}),
        ("budget", {"arms": [{"name": "a"}], "budget": 3}),
        ("budget", {**search(), "budget": 3}),
        ("search.budget", {"search": {"space": SPACE}}),
        ("search.budget", search(budget=0)),
        ("search.space", search(space={})),
        ("search.space.reft.rank.choices", search(space={"reft.rank": []})),
        ("search.space.reft.rank.range", search(space={"reft.rank": {"low": 8, "high": 2}})),
        ("search.sampler", search(sampler="grid")),
        ("search.parallel", search(parallel=0)),
        ("tasks", {"preset": "cross_task"}),
        ("tasks", tasks() | {"tasks": tasks()["tasks"][:1]}),
        ("tasks", {"preset": "order", "tasks": tasks()["tasks"]}),
        ("tasks[1].name", tasks(name="boolq")),
        ("training_file", tasks() | {"training_file": "file-a"}),
        ("test_file", tasks() | {"test_file": "file-a"}),
    ],
)
def test_a_request_of_the_wrong_form_is_refused(path: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        spec(**changes)
    fault = refused.value.errors()[0]
    assert fault.get("ctx", {}).get("path", ".".join(str(step) for step in fault["loc"])) == path


# -- searches ---------------------------------------------------------------------------------------------------------


def test_a_search_begins_with_as_many_trials_as_run_at_a_time() -> None:
    planned = arms(**search(parallel=3), baseline="as it is")
    assert [arm.name.split(":")[0] for arm in planned] == ["as it is", "trial 1", "trial 2", "trial 3"]
    assert planned[0].spec.stages()[1].learning_rate == "auto"
    for arm in planned[1:]:
        assert arm.trial is not None
        stage = arm.spec.stages()[1]
        assert arm.trial.params == {"reft.rank": stage.rank, "reft.learning_rate": stage.learning_rate}
        assert 1e-5 <= stage.learning_rate <= 1e-3
    again = arms(**search(parallel=3), baseline="as it is")
    assert [arm.name for arm in again] == [arm.name for arm in planned]
    assert [arm.name for arm in arms(**search(parallel=3), seeds=[7])] != [arm.name for arm in planned[1:]]
    assert len(arms(**search(budget=1, parallel=3))) == 1
    assert len(arms(**search(space={"reft.rank": [2, 4]}, parallel=5))) == 2


def test_a_point_that_can_not_be_is_no_first_trial() -> None:
    planned = arms(**search(space={"reft.layers": {"low": 0, "high": 59}}, parallel=10))
    assert len(planned) == 10
    assert all(arm.spec.stages()[1].layers[0] < 30 for arm in planned)


def test_what_can_not_be_later_is_left_out_with_a_reason() -> None:
    study = spec(**search(space={"reft.layers": {"low": 0, "high": 59}})).completed()
    arm = trial_json(study, Trial(number=4, params={"reft.layers": 31}), BASE)
    assert arm["name"] == "trial 4: reft.layers=31"
    assert arm["trial"]["state"] == "pruned"
    assert arm["trial"]["reason"] == "there is no layer 31: the model has layers 0 to 29"
    assert trial_json(study, Trial(number=4, params={"reft.layers": 29}), BASE)["trial"]["state"] == "running"


def run_of(arm: str, state: str, value: float | None = None) -> Run:
    """A job of a trial, with this value on the validation rows."""
    outcome = None if value is None else Outcome(outcomes={"validation": {"value": value}})
    return Run(arm=arm, seed=1, job=Job(state=state), outcome=outcome, metric=None)


def test_a_trial_is_the_mean_over_its_seeds_and_fails_with_any_of_them() -> None:
    planned = [arm.to_json() for arm in arms(**search(parallel=3), baseline="as it is")]
    first, second, third = (arm["name"] for arm in planned[1:])
    runs = [
        run_of(first, "succeeded", 0.5),
        run_of(first, "succeeded", 0.6),
        run_of(second, "succeeded", 0.9),
        run_of(second, "failed"),
        run_of(third, "succeeded", 0.9),
        run_of(third, "running"),
        run_of("as it is", "succeeded", 1.0),
    ]
    with_results = arms_with_results(Study(spec={"planned": planned, "seeds": [1, 2]}), runs)
    assert with_results[0] == planned[0]
    trials = trials_of(with_results)
    assert [trial.state for trial in trials] == ["complete", "failed", "running"]
    assert trials[0].value == pytest.approx(0.55)
    assert trials[1].reason == "1 failed of 2 jobs"
    assert (best(with_results) or {})["name"] == first
    assert best(planned) is None


def test_as_many_trials_are_made_as_the_budget_and_the_places_allow() -> None:
    def places(*states: Any, budget: int = 6, parallel: int = 2, **closed: str) -> int:
        trials = [Trial(number=n, params={"reft.rank": n}, state=state) for n, state in enumerate(states, 1)]
        space = {"reft.rank": {"low": 1, "high": 100}}
        return free_slots({"space": space, "budget": budget, "parallel": parallel, **closed}, trials)

    assert places() == 2
    assert places("running", "complete") == 1
    assert places("running", "running") == 0
    assert places(*["complete"] * 5) == 1
    assert places(*["complete"] * 6) == 0
    assert places(*["complete"] * 5, "pruned") == 1  # it has cost nothing
    assert places(*["pruned"] * 6) == 0
    assert places(*["failed"] * 4) == 2
    assert places(*["failed"] * MAX_INITIAL_FAILURES) == 0
    assert places("complete", *["failed"] * MAX_INITIAL_FAILURES, budget=9) == 2
    assert places(closed="no file") == 0


# -- several tasks ----------------------------------------------------------------------------------------------------


def test_cross_task_is_every_method_on_every_task() -> None:
    planned = arms(**tasks(training_file="file-c"), baseline="HEFT 3+3", task={"type": "yes_no"})
    methods = ["LoRA alone 6", "ReFT alone 6", "HEFT 3+3"]
    assert [arm.name for arm in planned] == [f"{m} on {t}" for t in ("boolq", "sst2") for m in methods]
    assert [(arm.method_name, arm.task) for arm in planned[:2]] == [
        (methods[0], "boolq"),
        (methods[1], "boolq"),
    ]
    assert [arm.spec.training_file for arm in planned] == ["file-a"] * 3 + ["file-c"] * 3
    assert [arm.spec.task.type for arm in planned] == ["yes_no"] * 3 + ["choice"] * 3
    assert {sum(epochs for _, epochs in stages(arm)) for arm in planned} == {6}


# -- presets ----------------------------------------------------------------------------------------------------------


def test_the_papers_table_is_the_papers_own_run() -> None:
    study = StudySpec(name="paper", preset="paper_table").completed()
    assert study.model == "meta-llama/Llama-2-7b-hf"
    assert (study.training_file, study.test_file) == ("hub:google/boolq:train", "hub:google/boolq:validation")
    planned = {arm.name: stages(arm) for arm in plan(study)}
    assert planned == {
        "LoRA alone 20": [("lora", 20)],
        "ReFT alone 20": [("reft", 20)],
        "HEFT 3+3": [("lora", 3), ("reft", 3)],
        "HEFT 20+20": [("lora", 20), ("reft", 20)],
    }


def test_a_preset_is_scaled_and_put_on_other_data() -> None:
    planned = {arm.name: stages(arm) for arm in arms(preset="paper_table", epochs_scale=0.3)}
    assert planned["HEFT 1+1"] == [("lora", 1), ("reft", 1)]
    assert planned["HEFT 6+6"] == [("lora", 6), ("reft", 6)]


def test_every_order_sees_as_many_epochs() -> None:
    planned = arms(preset="order", epochs_scale=2)
    assert [[type for type, _ in stages(arm)] for arm in planned] == [
        ["lora", "reft"],
        ["reft", "lora"],
        ["lora", "reft", "lora", "reft"],
    ]
    assert {sum(epochs for _, epochs in stages(arm)) for arm in planned} == {12}


def test_layers_and_ranks_follow_the_models_depth() -> None:
    reft_stages = [arm.spec.stages()[1] for arm in arms(preset="layer_rank")]
    assert sorted({(stage.layers[0], stage.rank) for stage in reft_stages}) == [
        (layer, rank) for layer in (9, 14, 19) for rank in (2, 4, 8)
    ]
    assert refused(base=None, preset="layer_rank") == "preset"


def test_variants_of_stage_1_are_arms_of_their_own() -> None:
    lora_stages = {arm.name: arm.spec.stages()[0] for arm in arms(preset="stage1_variants")}
    assert list(lora_stages) == ["LoRA", "rsLoRA", "DoRA", "PiSSA", "OLoRA", "DoRA + PiSSA"]
    assert (lora_stages["DoRA + PiSSA"].use_dora, lora_stages["DoRA + PiSSA"].init) == (True, "pissa")


def test_kinds_of_stage_2_are_those_that_the_engine_has() -> None:
    kinds = presets.stage2_kinds()
    assert len(kinds) > 1
    assert [arm.spec.stages()[1].kind for arm in arms(preset="stage2_variants")] == list(kinds)


@pytest.mark.parametrize(
    ("budget", "states", "because"),
    [
        (3, ["complete", "failed", "failed"], None),
        (MAX_INITIAL_FAILURES, ["failed"] * MAX_INITIAL_FAILURES, None),
        (
            MAX_INITIAL_FAILURES + 1,
            ["failed"] * MAX_INITIAL_FAILURES,
            f"the first {MAX_INITIAL_FAILURES} trials have all failed",
        ),
        (2, ["complete", "complete", "pruned", "pruned"], None),
        (2, ["complete", "pruned", "pruned"], "2 of the suggested points have invalid settings"),
        (50, ["complete"] * 6, "every point of the space has been tried"),
        (50, ["complete"] * 5, None),
    ],
)
def test_a_search_says_why_it_ended_before_its_budget_was_spent(
    budget: int, states: list[Any], because: str | None
) -> None:
    settings = spec(**search(space={"reft.rank": [1, 2, 3, 4, 5, 6]}, budget=budget)).search
    assert settings is not None
    trials = [
        Trial(number=number, params={"reft.rank": number}, state=state)
        for number, state in enumerate(states, 1)
    ]
    assert stop_reason(settings.model_dump(mode="json"), trials) == because


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("training_file", {"training_file": "hub:allenai/ai2_arc", "preset": "order"}),
        ("tasks[1].training_file", tasks(training_file="hub:allenai/ai2_arc")),
        ("tasks[1].test_file", tasks(test_file="hub:allenai/ai2_arc")),
    ],
)
def test_what_a_datasets_name_shows_is_refused_with_the_requests_own_field(
    field: str, changes: dict[str, Any]
) -> None:
    assert refused(**changes) == field


def invalid(**changes: Any) -> None:
    with pytest.raises(ValidationError):
        spec(**changes)


def test_settings_of_a_grid_and_of_an_arm_have_bounds() -> None:
    invalid(grid={"reft." * 16_000: [1]})
    invalid(grid={f"reft.{number}": [1] for number in range(MAX_CHANGES + 1)})
    invalid(grid={"reft.rank": list(range(MAX_CHOICES + 1))})
    invalid(grid={"reft.rank": ["x" * MAX_VALUE_CHARS]})
    invalid(arms=[{"name": "a", "set": {"reft." * 100: 1}}])
    invalid(arms=[{"name": "a", "set": {"reft.rank": ["x"] * MAX_VALUE_CHARS}}])
    invalid(**search(space={"reft." * 100: [1, 2]}))


def test_a_name_of_many_parts_costs_no_copy_of_each_beginning() -> None:
    """A name of 80 kB once took 1.9 GB."""
    fields = RequestFields(changes="grid", changed_settings=("a." * 20_000 + "b", "reft.rank"))
    tracemalloc.start()
    try:
        assert fields.param("method.heft.reft") == "grid.reft.rank"
        assert fields.param("method.x") == "method.x"
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_the_epochs_of_all_stages_have_a_bound() -> None:
    many = [{"type": "lora", "n_epochs": 1_000}] * 3
    assert (
        refused(method={"type": "recipe", "recipe": {"stages": many}}, grid={"max_length": [64]}) == "method"
    )
    few = {"type": "recipe", "recipe": {"stages": many[:2]}}
    assert len(arms(method=few, grid={"max_length": [64]})) == 1
