"""Runs of the engine on tiny models and few rows, in float32 on one thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from heft_engine.adapters.reft import KINDS, ReftIntervention
from heft_engine.bundle.format import Bundle
from heft_engine.config.run_file import RunOptions
from heft_engine.config.train import ReftStage, Stage, TrainConfig
from heft_engine.data.encoding import Encoder, Example
from heft_engine.data.rows import Row, parse_row
from heft_engine.events import Event, OnEvent
from heft_engine.model.base_models import resolve_path
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.packed_lm import PackedLM
from heft_engine.training.run import run_stages
from heft_engine.training.schedule import derived_seed
from heft_engine.training.setup import RunInputs, load

SEED = 3
#: Prompts of 2 to 29 tokens: shorter than `f4+l3` asks for, and longer than the tiny models' windows.
_PROMPTS = (
    "a",
    "b?",
    "is it",
    "the import system of the language",
    "x y z " * 4,
    "what do you say of it? " * 3,
)
_ANSWERS = (" true", " it is false", "no", " in the module")


def text_rows(count: int = 16) -> list[Row]:
    """Prompts of very different lengths with completions of a few tokens."""
    return [
        parse_row(
            {
                "prompt": _PROMPTS[i % len(_PROMPTS)] + str(i),
                "completion": _ANSWERS[i % len(_ANSWERS)],
            }
        )
        for i in range(count)
    ]


def yes_no_rows(count: int = 12) -> list[Row]:
    """Yes/no rows, with one supervised token each."""
    colours = ("red", "blue", "green")
    return [
        parse_row(
            {
                "passage": f"The box {'of number ' * (i % 4)}{i} is {colours[i % 3]}.",
                "question": f"is box {i} red?",
                "answer": "yes" if i % 3 == 0 else "no",
            }
        )
        for i in range(count)
    ]


def reft(**settings: Any) -> ReftStage:
    """A ReFT stage with pyreft's schedule (linear from the first step), quick enough for a tiny model."""
    defaults = {"layers": [2], "n_epochs": 5, "batch_size": 4, "learning_rate": 1e-2, "warmup_ratio": 0.0}
    return ReftStage.model_validate(defaults | settings)


def load_inputs(path: Path, stages: Sequence[Stage], rows: Sequence[Row], **config: Any) -> RunInputs:
    """Returns the inputs of a run of these stages, without validation and test rows."""
    settings = TrainConfig(model=str(path), stages=list(stages), dtype="float32", seed=SEED, **config)
    return load(settings, resolve_path(path), rows, (), (), "cpu")


def train_inputs(
    inputs: RunInputs,
    out: Path,
    on_event: OnEvent = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    **options: Any,
) -> Bundle:
    """Trains on these inputs. `options`: fields of RunOptions."""
    return run_stages(inputs, out, on_event, RunOptions(**options), should_stop=should_stop)


def put_interventions(lm: PackedLM, stage: ReftStage) -> list[ReftIntervention]:
    """Adds new interventions to the model: the stage continues with them and their raw weights."""
    torch.manual_seed(SEED)
    assert stage.layers != "auto"
    fresh = [KINDS[stage.kind](lm.hidden_size, stage.rank) for _ in stage.layers]
    lm.interventions.extend(
        PlacedIntervention(layer=layer, positions=stage.positions, intervention=intervention)
        for layer, intervention in zip(stage.layers, fresh, strict=True)
    )
    return fresh


def step_losses(events: Sequence[Event]) -> list[float]:
    return [event.data["loss"] for event in events if event.code == "METRICS"]


def steps_of(inputs: RunInputs) -> list[list[Example]]:
    """The rows of the first stage's steps: their order is a function of seed, stage and epoch alone."""
    stage = inputs.config.stages[0]
    steps = []
    for epoch in range(stage.n_epochs):
        generator = torch.Generator().manual_seed(derived_seed(SEED, 0, epoch))
        order = torch.randperm(len(inputs.examples), generator=generator).tolist()
        size = stage.batch_size
        steps += [[inputs.examples[i] for i in order[at : at + size]] for at in range(0, len(order), size)]
    return steps


def questions(encoder: Encoder, rows: Sequence[Row]) -> list[Example]:
    """Examples as serving scores them: with every label as an answer."""
    return [encoder.question(row) for row in rows]
