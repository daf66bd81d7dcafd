"""Runs of the engine on tiny models, and rows that a tiny model can learn from: the passage holds the answer."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from heft_engine.bundle.format import Bundle
from heft_engine.config.run_file import RunOptions
from heft_engine.config.train import InterventionKind, LoraStage, ReftStage, Stage, TrainConfig, recipe
from heft_engine.data.rows import Row, parse_row
from heft_engine.errors import Stopped
from heft_engine.events import Event
from heft_engine.runtime.distributed import SINGLE_PROCESS, Ranks
from heft_engine.training.activation_store import ActivationStore
from heft_engine.training.run import train
from heft_engine.training.stage_cache import StageStore

_THINGS = ("sea", "river", "stone", "name", "list", "class", "string", "number")


def yes_no(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose answer is one word of the passage."""
    rng = random.Random(f"yes_no/{seed}")
    rows = []
    for _ in range(n):
        answer, thing = rng.random() < 0.5, rng.choice(_THINGS)
        passage = f"{' '.join(rng.sample(_THINGS, rng.randint(1, 6)))} {'true' if answer else 'false'}."
        rows.append({"question": f"is the {thing} so", "passage": passage, "answer": answer})
    return rows


def choice(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Choices of one and of several tokens; the right one stands in the passage."""
    rng = random.Random(f"choice/{seed}")
    rows = []
    for _ in range(n):
        choices = [f"{part} of the {whole}" for part, whole in (rng.sample(_THINGS, 2) for _ in range(2))]
        choices = list(dict.fromkeys([*choices, rng.choice(_THINGS)]))
        answer = rng.choice(choices)
        rows.append({"question": "what is it", "passage": answer, "choices": choices, "answer": answer})
    return rows


def text(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows that ask to repeat a word."""
    rng = random.Random(f"text/{seed}")
    return [{"prompt": f"Say {word}:", "completion": word} for word in rng.choices(_THINGS, k=n)]


ROWS: dict[str, Callable[..., list[dict[str, Any]]]] = {"yes_no": yes_no, "choice": choice, "text": text}


def parse(rows: Sequence[dict[str, Any]]) -> list[Row]:
    return [parse_row(row) for row in rows]


#: Strong enough to move a tiny model within a few steps.
LORA = LoraStage(n_epochs=2, batch_size=8, learning_rate=5e-3)
REFT = ReftStage(n_epochs=2, batch_size=8, learning_rate=1e-2, rank=2)


def but(stage: LoraStage | ReftStage, **changes: Any) -> Any:
    """The stage with changes, validated."""
    return type(stage).model_validate({**stage.model_dump(), **changes})


#: Variants of LoRA.
VARIANTS = [
    but(LORA, use_rslora=True, init="olora"),
    but(LORA, use_dora=True, learning_rate=2e-2),
    but(LORA, init="pissa"),
    but(LORA, use_dora=True, init="pissa_niter_4"),
]
#: Every kind of ReFT beside LoReFT, at several layers.
KINDS = [
    but(REFT, kind=kind, layers=[index % 4]) for index, kind in enumerate(get_args(InterventionKind)[1:])
]


def config(
    model: Path, method: Any = "heft", stages: list[Stage] | None = None, **settings: Any
) -> TrainConfig:
    """A float32 run of a tiny model; LORA and REFT unless `stages` are given."""
    named = stages or recipe(method, LORA, REFT)
    return TrainConfig(model=str(model), method=method, stages=named, **{"dtype": "float32", **settings})


@dataclass
class RunRecord:
    """The events of a run, and the bundle that it wrote."""

    events: list[Event] = field(default_factory=list)
    bundle: Bundle | None = None

    def data(self, code: str) -> list[dict[str, Any]]:
        return [event.data for event in self.events if event.code == code]

    def one(self, code: str) -> dict[str, Any]:
        (data,) = self.data(code)
        return data

    @property
    def losses(self) -> dict[int, float]:
        """The loss of each step."""
        return {metrics["step"]: metrics["loss"] for metrics in self.data("METRICS")}


def tensors(record: RunRecord) -> dict[str, Tensor]:
    """All that a run has trained, as its bundle holds it."""
    assert record.bundle is not None
    state = {}
    for index, adapter in enumerate(record.bundle.adapters):
        for name, (down, up) in adapter.factors.items():
            state |= {f"{index}/{name}/A": down, f"{index}/{name}/B": up}
        state |= {f"{index}/{name}/m": tensor for name, tensor in (adapter.magnitudes or {}).items()}
    for index, placed in enumerate(record.bundle.interventions):
        state |= {f"{index}/{name}": tensor for name, tensor in placed.state.items()}
    return state


def run(
    config: TrainConfig,
    out: Path,
    rows: Sequence[Row] | None = None,
    validation: Sequence[Row] = (),
    *,
    record: RunRecord | None = None,
    test_rows: Sequence[Row] = (),
    stage_store: StageStore | None = None,
    activations: ActivationStore | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = SINGLE_PROCESS,
    **options: Any,
) -> RunRecord:
    """Trains on 24 yes/no rows, or those passed. `record` is filled as events come, and outlives an error.

    `options`: fields of RunOptions.
    """
    record = record or RunRecord()
    record.bundle = train(
        config,
        rows or parse(yes_no(24)),
        validation,
        out,
        record.events.append,
        test_rows=test_rows,
        options=RunOptions(device="cpu", **options),
        stage_store=stage_store,
        activations=activations,
        should_stop=should_stop,
        ranks=ranks,
    )
    return record


def interrupted(
    settings: TrainConfig, folder: Path, stops: list[int], validation: Sequence[Row] = (), **options: Any
) -> tuple[dict[int, float], RunRecord]:
    """Stops at these calls of `should_stop`, counted over all attempts; resumes from the newest checkpoint each time.

    Returns the losses of all attempts, step by step, and the last attempt.
    """
    calls = itertools.count(1)
    losses: dict[int, float] = {}
    resume = None
    for attempt in range(len(stops) + 1):
        record = RunRecord()
        # A resumed process starts with another random state.
        torch.manual_seed(1_000 + attempt)
        try:
            run(
                settings,
                folder / "out",
                None,
                validation,
                record=record,
                checkpoint_dir=folder / f"checkpoints-{attempt}",
                resume=resume,
                should_stop=lambda: next(calls) in stops,
                **options,
            )
        except Stopped:
            resume = Path(record.data("CHECKPOINT_SAVED")[-1]["path"])
        assert not losses.keys() & record.losses.keys(), "no step is done twice"
        losses |= record.losses
    return losses, record


def assert_equal(first: RunRecord, second: RunRecord) -> None:
    """Same weights and same record: what was trained, evaluated and measured."""
    mine, theirs = tensors(first), tensors(second)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert first.bundle is not None
    assert second.bundle is not None
    assert first.bundle.info == second.bundle.info
    assert first.bundle.probe == second.bundle.probe
    assert first.one("SUCCEEDED")["trained_tokens"] == second.one("SUCCEEDED")["trained_tokens"]
