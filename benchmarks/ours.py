"""The engine's side of a measurement: the very objects that a run uses, without its evaluation and its files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from heft_engine import lora
from heft_engine.config import LoraStage, ReftStage
from heft_engine.encoding import Example
from heft_engine.events import Event
from heft_engine.model import PackedLM
from heft_engine.sources import CachePlan, PlainSource, Source
from heft_engine.suffix_cache import Rung, size_of
from heft_engine.trainables import LoraTrainable, ReftTrainable
from heft_engine.training import Hooks, StageRun


def train(
    lm: PackedLM, stage: LoraStage | ReftStage, rows: Sequence[Example], rung: Rung = "keys_values"
) -> dict[str, Any]:
    """Trains one stage. Returns the seconds of the prefill and of each epoch, the losses step by step, the cache."""
    torch.manual_seed(0)
    trainable = attach(lm, stage)
    began = time.perf_counter()
    source: Source = PlainSource(lm=lm, examples=rows)
    size = 0
    if isinstance(stage, ReftStage):
        size = size_of(lm, trainable.boundary(), rows, rung)
        source = CachePlan(rung=rung, on_disk=False, bytes=size).open(lm, trainable.boundary(), rows, None)
    prefill = time.perf_counter() - began
    losses: list[float] = []
    ends: list[float] = []
    _run(lm, stage, rows, source, trainable, _listener(losses, ends))
    starts = [began + prefill, *ends[:-1]]
    epochs = [end - start for start, end in zip(starts, ends, strict=True)]
    if isinstance(stage, LoraStage) and isinstance(trainable, LoraTrainable):
        assert stage.target_modules != "auto"
        adapter = lora.extract(trainable.adapted, stage, stage.target_modules, None)
        lora.detach(trainable.adapted)
        lora.merge(lm.model, adapter)
    return {"prefill": prefill, "epochs": epochs, "losses": losses, "cache_bytes": size}


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
    on_event: Callable[[Event], None],
) -> None:
    StageRun(
        lm=lm,
        stage=stage,
        index=0,
        seed=0,
        trainable=trainable,
        examples=rows,
        source=source,
        validation=[],
        validation_source=PlainSource(lm=lm, examples=[]),
        probe=rows[:4],
        early_stopping=None,
        first_step=0,
        total_steps=stage.n_epochs * -(-len(rows) // stage.batch_size),
        hooks=Hooks(on_event=on_event, save=lambda *_: None, should_stop=lambda: False),
    ).run()
