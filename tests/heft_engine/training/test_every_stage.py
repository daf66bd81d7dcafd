"""Every adapter with every objective is trained, merged or left in place, resumed with equal bits, served, exported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from engine_runs import (
    KINDS,
    LORA,
    REFT,
    VARIANTS,
    RunRecord,
    assert_equal,
    but,
    config,
    interrupted,
    parse,
    run,
    yes_no,
)
from safetensors.torch import load_file
from torch import Tensor

from heft_engine.adapters.registry import ADAPTERS
from heft_engine.bundle.export import Format, export
from heft_engine.config.train import ObjectiveSettings, Stage, SupervisedSettings, TrainConfig
from heft_engine.data.encoding import Example
from heft_engine.errors import ConfigError
from heft_engine.model.loss import LossSums
from heft_engine.model.packed_lm import PackedLM
from heft_engine.objectives.registry import OBJECTIVES
from heft_engine.objectives.supervised import SupervisedObjective
from heft_engine.serving.predictor import load

VALIDATION = parse(yes_no(16, seed=1))
#: Every variant of each adapter.
STAGES: dict[str, list[Stage]] = {"lora": [LORA, *VARIANTS], "reft": [REFT, *KINDS]}
SETTINGS: dict[str, ObjectiveSettings] = {"supervised": SupervisedSettings()}
#: The export formats that hold what an adapter leaves, beside `merged`.
FORMATS: dict[str, Format] = {"lora": "peft", "reft": "pyreft"}


def test_every_adapter_and_objective_is_covered() -> None:
    assert STAGES.keys() == ADAPTERS.keys() == FORMATS.keys()
    assert SETTINGS.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_stage_trains_any_adapter_for_any_objective(
    tiny_llama_dir: Path, tmp_path: Path, adapter: str, objective: str
) -> None:
    stages = [but(stage, n_epochs=1, objective=SETTINGS[objective]) for stage in STAGES[adapter]]
    settings = config(tiny_llama_dir, "recipe", stages)
    whole = run(settings, tmp_path / "whole", None, VALIDATION)
    merges = ADAPTERS[adapter].merges
    assert len(whole.data("MERGE_VERIFIED")) == (len(stages) if merges else 0)
    resumes_with_equal_bits(settings, tmp_path / "parts", whole)
    serves_what_was_evaluated(tmp_path / "whole", whole)
    exports(tmp_path, FORMATS[adapter], merges=merges)


def resumes_with_equal_bits(settings: TrainConfig, folder: Path, whole: RunRecord) -> None:
    """Checks that a run stopped once in the middle of each stage equals an uninterrupted one."""
    stages = len(settings.stages)
    calls_per_stage = (len(whole.losses) + stages) // stages  # after each step, and at the epoch's end
    losses, last = interrupted(
        settings, folder, [index * calls_per_stage + 2 for index in range(stages)], VALIDATION
    )
    assert losses == whole.losses
    assert_equal(last, whole)


def serves_what_was_evaluated(bundle: Path, record: RunRecord) -> None:
    predictions = load(bundle, device="cpu").predict(VALIDATION)
    correct = sum(p.answer == row.answer for p, row in zip(predictions, VALIDATION, strict=True))
    assert correct == record.data("EVALUATION")[-1]["correct"]


def exports(folder: Path, format: Format, *, merges: bool) -> None:
    export(folder / "whole", format, folder / format)
    assert list((folder / format).iterdir())
    with pytest.raises(ConfigError, match="there is no"):
        export(folder / "whole", "pyreft" if format == "peft" else "peft", folder / "none")
    export(folder / "whole", "merged", folder / "merged")
    served = load(folder / "whole", device="cpu").lm.model.state_dict()
    exported = load_file(folder / "merged" / "model.safetensors")
    assert all(torch.equal(tensor, served[name]) for name, tensor in exported.items())
    assert bool(list((folder / "merged").glob("reft*"))) == (not merges)


class LastLossWeighs(SupervisedObjective):
    """An objective with state and metrics: it multiplies the loss by a weight that follows earlier losses."""

    def __init__(self) -> None:
        self.weight = torch.ones(())

    def loss(self, lm: PackedLM, hidden: Tensor, examples: Sequence[Example]) -> LossSums:
        loss, correct = super().loss(lm, hidden, examples)
        loss = loss * float(self.weight)
        if loss.requires_grad:
            self.weight.copy_(0.5 * self.weight + 0.5 / (1 + loss.detach()))
        return LossSums(loss, correct)

    def report(self) -> dict[str, float]:
        return {"weight": float(self.weight)}

    def buffers(self) -> dict[str, Tensor]:
        return {"weight": self.weight}


def test_an_objective_has_state_and_figures_of_its_own(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OBJECTIVES, "supervised", LastLossWeighs)
    settings = config(tiny_llama_dir, "reft")
    whole = run(settings, tmp_path / "whole", None, VALIDATION)
    weights = [epoch["weight"] for epoch in whole.data("EPOCH_COMPLETE")]
    assert len({1.0, *weights}) == 3
    losses, last = interrupted(settings, tmp_path / "parts", [2, 6], VALIDATION)
    assert losses == whole.losses
    assert_equal(last, whole)
