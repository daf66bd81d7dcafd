"""The engine's side of a measurement: the very objects that a run uses, without its evaluation and its files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from heft_engine import lora
from heft_engine.config import LoraStage, ReftStage
from heft_engine.encoding import Example
from heft_engine.events import Event
from heft_engine.memory import peak
from heft_engine.model import PackedLM
from heft_engine.sources import CacheBudget, PlainSource, Source
from heft_engine.stage_plan import Planner, StagePlan
from heft_engine.suffix_cache import Rung, size_of
from heft_engine.trainables import LoraTrainable, ReftTrainable
from heft_engine.training import Hooks, Progress, StageRun


def train(
    lm: PackedLM,
    stage: LoraStage | ReftStage,
    rows: Sequence[Example],
    rung: Rung = "keys_values",
    compiled: bool | Literal["auto"] = "auto",
) -> dict[str, Any]:
    """Trains one stage. Returns seconds (of planning and compiling, of the prefill, of each epoch), the losses step by
    step, and bytes (of the cache, as estimated for the whole process, and as they were at most)."""
    torch.manual_seed(0)
    trainable = attach(lm, stage)
    boundary = trainable.boundary()
    planner = Planner(
        lm=lm,
        stage=stage,
        index=0,
        seed=0,
        trainable=trainable,
        boundary=boundary,
        examples=rows,
        validation=[],
        budget=CacheBudget(memory=size_of(lm, boundary, rows, rung)),
        compile=compiled,
        cache_dir=None,
    )
    losses: list[float] = []
    ends: list[float] = []
    began = time.perf_counter()
    with peak(lm.device) as most, planner.planned(None) as plan:
        preparing = time.perf_counter() - began
        source = plan.cache.open(lm, boundary, rows, None)
        prefill = time.perf_counter() - began - preparing
        _run(lm, stage, rows, source, trainable, plan, _listener(losses, ends))
        held = most()
    starts = [began + preparing + prefill, *ends[:-1]]
    epochs = [end - start for start, end in zip(starts, ends, strict=True)]
    if isinstance(stage, LoraStage) and isinstance(trainable, LoraTrainable):
        assert stage.target_modules != "auto"
        adapter = lora.extract(trainable.adapted, stage, stage.target_modules, None)
        lora.detach(trainable.adapted)
        lora.merge(lm.model, adapter)
    return {
        "preparing": preparing,
        "prefill": prefill,
        "epochs": epochs,
        "losses": losses,
        "rung": plan.cache.rung,
        "compiled": plan.compiled,
        "cache_bytes": plan.cache.bytes,
        "estimated_bytes": plan.memory_bytes,
        "held_bytes": held,
    }


def attach(lm: PackedLM, stage: LoraStage | ReftStage) -> LoraTrainable | ReftTrainable:
    return (
        LoraTrainable.attach(lm, stage) if isinstance(stage, LoraStage) else ReftTrainable.attach(lm, stage)
    )


def _listener(losses: list[float], ends: list[float]) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if event.code == "METRICS":
            losses.append(event.data["loss"])
        elif event.code == "EPOCH_COMPLETE":
            ends.append(time.perf_counter())

    return listen


def _run(
    lm: PackedLM,
    stage: LoraStage | ReftStage,
    rows: Sequence[Example],
    source: Source,
    trainable: LoraTrainable | ReftTrainable,
    plan: StagePlan,
    on_event: Callable[[Event], None],
) -> None:
    StageRun(
        stage=stage,
        index=0,
        seed=0,
        trainable=trainable,
        examples=rows,
        source=source,
        validation=[],
        validation_source=PlainSource(lm=lm, examples=[]),
        early_stopping=None,
        first_step=0,
        total_steps=stage.n_epochs * -(-len(rows) // stage.batch_size),
        progress=Progress(**plan.of_progress),
        hooks=Hooks(on_event=on_event, save=lambda *_: None, should_stop=lambda: False),
    ).run()
