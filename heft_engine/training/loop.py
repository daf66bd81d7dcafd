"""The one training loop, for every stage of every recipe.

A stage hands in its parameters; the loop shuffles, packs, steps, reports, checkpoints and stops. The loss of a step is
the sum over its supervised tokens divided by their number, however the step was cut into micro-batches. The same seed
gives the same losses, step for step, and a stage that goes on from a checkpoint the same weights, bit for bit
(float32 on a CPU).

It does NOT know LoRA from LoReFT, nor where checkpoints and events go.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from heft_engine.adapters.adapter import Adapter
from heft_engine.config.train import EarlyStopping, Stage
from heft_engine.data.encoding import Example
from heft_engine.errors import Stopped, TrainingError
from heft_engine.events import Event, OnEvent
from heft_engine.model.packing import packed_length
from heft_engine.training.forward_pass import Source, cut, mean_source_loss

BETAS, EPSILON = (0.9, 0.999), 1e-8
#: Tokens of one forward and backward pass, at most: larger ones are no quicker. Bits of the gradient's sum depend on
#: it, so checkpoints carry it.
TOKEN_BUDGET = 1_536
#: After so many steps (or at the end of a shorter stage) the stage must have changed what the model says.
TRAINS_AFTER = 20
#: That is looked for in this many rows, the shortest of so many.
_PROBE_ROWS, _PROBE_CANDIDATES = 4, 64
#: A loss this many times the lowest running mean, and above 1 nat more, is called divergence.
DIVERGED = 2.0


def derived_seed(*parts: int) -> int:
    """A seed of its own for each stage, epoch and purpose, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def epoch_order(seed: int, stage_index: int, epoch: int, rows: int) -> list[int]:
    """An epoch's order of rows: a function of seed, stage and epoch alone, so that resuming needs no state."""
    generator = torch.Generator().manual_seed(derived_seed(seed, stage_index, epoch))
    return [int(i) for i in torch.randperm(rows, generator=generator)]


@dataclass(kw_only=True)
class Progress:
    """Where a stage stands; JSON values only, because checkpoints carry it."""

    epoch: int = 0
    step: int = 0  #: optimiser steps of this stage so far
    tokens: int = 0
    seconds: float = 0.0
    epoch_loss: float = 0.0  #: sum over the epoch's supervised tokens so far
    epoch_tokens: int = 0
    loss: float | None = None  #: of the last step, mean over its supervised tokens
    valid_loss: float | None = (
        None  #: at the end of the last epoch; None without validation rows or if infinite
    )
    running: float | None = None  #: exponential mean of the step losses
    lowest: float | None = None
    warned: bool = False
    best_loss: float | None = None
    bad_epochs: int = 0
    #: How passes run: decided at the stage's start, because it moves bits.
    token_budget: int = TOKEN_BUDGET
    compiled: bool = False
    checkpointing: bool = False
    finished: bool = False
    #: How the stage's rows and the validation rows are cached: decided at the stage's start, because it moves bits.
    cache: dict[str, Any] | None = None
    validation_cache: dict[str, Any] | None = None

    @property
    def losses(self) -> dict[str, float]:
        """The latest losses in nats a token, by OpenAI's names; without those that are not known."""
        values = {"train_loss": self.loss, "valid_loss": self.valid_loss}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Progress:
        """From a checkpoint's values; what other versions keep there besides is left out."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the loop asks of its owner: to publish, to save, and whether to go on."""

    on_event: OnEvent
    #: Progress, how to get the tensors, and whether a checkpoint is due whatever the clock says.
    save: Callable[[Progress, Callable[[], dict[str, Tensor]], bool], None]
    should_stop: Callable[[], bool]


@dataclass(kw_only=True)
class TrainLoop:
    """One stage's training. `examples` and `evaluation` hold their right answers alone."""

    stage: Stage
    index: int
    seed: int
    trainable: Adapter
    examples: Sequence[Example]
    source: Source  #: of the examples' losses
    validation: Sequence[Example]
    validation_source: Source
    early_stopping: EarlyStopping | None
    first_step: int  #: optimiser steps of the run before this stage
    total_steps: int  #: of the whole run
    hooks: Hooks
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Tensor] = field(default_factory=dict)
    before: Tensor | None = None  #: what the model said of the probe rows before the first step

    def __post_init__(self) -> None:
        parameters, no_decay = self.trainable.parameters(), self.trainable.no_decay()
        decay = [parameter for name, parameter in parameters.items() if name not in no_decay]
        plain = [parameter for name, parameter in parameters.items() if name in no_decay]
        groups = [
            {"params": decay, "weight_decay": self.stage.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPSILON)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.examples) / self.stage.batch_size)

    def run(self) -> None:
        """Trains to the end. Raises Stopped after a checkpoint, TrainingError when training can't succeed."""
        self.trainable.train(
            False
        )  # new modules begin in training mode, where dropout would move the probe rows
        if self.before is None:
            self.before = self._probe_hidden()
        while self.progress.epoch < self.stage.n_epochs and not self.progress.finished:
            order = self._order(self.progress.epoch)
            for start in range(self._done_in_epoch(), len(order), self.stage.batch_size):
                self._step(order[start : start + self.stage.batch_size])
                if self.progress.step == min(TRAINS_AFTER, self.stage.n_epochs * self.steps_per_epoch):
                    self._check_trains()
                self._save_or_stop()
            self._end_epoch()
        if self.progress.step < TRAINS_AFTER:
            self._check_trains()  # stopped early, before the usual time to look
        if self.best:
            self._load(self.best)
            self.progress.valid_loss = self.progress.best_loss
        self._check()

    # -- one step ---------------------------------------------------------------------------------------------------

    def _step(self, rows: Sequence[int]) -> None:
        began = time.monotonic()
        progress = self.progress
        count = sum(self.examples[row].supervised_tokens for row in rows)
        self.trainable.train(True)
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in cut(self.source, rows, progress.token_budget):
            loss = self.source.loss(part)
            (loss / count).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        self.trainable.train(False)
        mean = total / count
        if not math.isfinite(mean):
            raise TrainingError(self._divergence(mean), code="diverged")
        rate = float(self.stage.learning_rate) * self._schedule(progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.stage.max_grad_norm)
        self.optimizer.step()
        progress.step += 1
        progress.tokens += sum(packed_length(self.examples[row]) for row in rows)
        progress.loss = mean
        progress.epoch_loss += total
        progress.epoch_tokens += count
        progress.seconds += time.monotonic() - began
        self._watch(mean)
        self._emit_metrics(mean, rate)

    def _schedule(self, step: int) -> float:
        """The learning rate's factor at a step (0-based): linear warm-up, then linear, cosine or constant."""
        total = self.stage.n_epochs * self.steps_per_epoch
        warmup = min(total - 1, round(self.stage.warmup_ratio * total))
        if step < warmup:
            return (step + 1) / (warmup + 1)
        left = (total - step) / (total - warmup)
        if self.stage.scheduler == "cosine":
            return 0.5 * (1 - math.cos(math.pi * left))
        return left if self.stage.scheduler == "linear" else 1.0

    def _order(self, epoch: int) -> list[int]:
        return epoch_order(self.seed, self.index, epoch, len(self.examples))

    def _done_in_epoch(self) -> int:
        return (self.progress.step - self.progress.epoch * self.steps_per_epoch) * self.stage.batch_size

    # -- the end of an epoch ----------------------------------------------------------------------------------------

    def _end_epoch(self) -> None:
        progress = self.progress
        self._check()
        data: dict[str, Any] = {"train_loss": progress.epoch_loss / progress.epoch_tokens}
        progress.epoch += 1
        progress.epoch_loss, progress.epoch_tokens = 0.0, 0
        if self.validation:
            loss = mean_source_loss(self.validation_source, self.validation, progress.token_budget)
            data["eval_loss"] = progress.valid_loss = loss if math.isfinite(loss) else None
            self._consider(loss)
        self._emit(
            "EPOCH_COMPLETE", f"Epoch {progress.epoch} of {self.stage.n_epochs}", epoch=progress.epoch, **data
        )
        self._save_or_stop(due=True)

    def _consider(self, loss: float) -> None:
        """Early stopping: keep the best parameters, stop after `patience` epochs without an improvement."""
        progress = self.progress
        if self.early_stopping is None:
            return
        if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
            progress.best_loss, progress.bad_epochs = loss, 0
            self.best = {name: p.detach().clone() for name, p in self.trainable.parameters().items()}
            return
        progress.bad_epochs += 1
        if progress.bad_epochs >= self.early_stopping.patience:
            progress.finished = True

    # -- what goes wrong --------------------------------------------------------------------------------------------

    def _watch(self, loss: float) -> None:
        progress = self.progress
        progress.running = loss if progress.running is None else 0.9 * progress.running + 0.1 * loss
        progress.lowest = min(progress.running, progress.lowest if progress.lowest is not None else math.inf)
        if not progress.warned and progress.running > max(DIVERGED * progress.lowest, progress.lowest + 1):
            progress.warned = True
            self._emit("WARNING", self._divergence(progress.running), level="warn", signature="diverges")

    def _divergence(self, loss: float) -> str:
        kind = self.stage.type
        lower = f"Lower {kind}.learning_rate (now {float(self.stage.learning_rate):.1e})"
        return f"Stage {kind} diverges: its loss rose to {loss:.3g}. {lower} or {kind}.rank (now {self.stage.rank})"

    @torch.inference_mode()
    def _probe_hidden(self) -> Tensor:
        """What the model says of a few short rows, through the cache: whole rows would take longer than steps."""
        first = range(min(len(self.examples), _PROBE_CANDIDATES))
        shortest = sorted(first, key=lambda index: packed_length(self.examples[index]))[:_PROBE_ROWS]
        return self.source.hidden(shortest).float().cpu()

    def _check(self) -> None:
        """Raises TrainingError for parameters that are no numbers (the last step may do it) or break a constraint."""
        if not all(parameter.isfinite().all() for parameter in self.trainable.parameters().values()):
            raise TrainingError(self._divergence(math.nan), code="diverged")
        self.trainable.check()

    def _check_trains(self) -> None:
        if self.before is not None and not torch.equal(self.before, self._probe_hidden()):
            return
        raise TrainingError(
            f"stage {self.stage.type} does not train: after {self.progress.step} steps its parameters have changed "
            f"nothing in the model's answers. Raise {self.stage.type}.learning_rate",
            code="does_not_train",
        )

    # -- saving and telling -----------------------------------------------------------------------------------------

    def _save_or_stop(self, due: bool = False) -> None:
        stop = self.hooks.should_stop()
        self.hooks.save(self.progress, self._tensors, due or stop)
        if stop:
            raise Stopped("stopped at a checkpoint, as asked")

    def _tensors(self) -> dict[str, Tensor]:
        """All that the stage continues from: raw parameters, Adam's state, the best parameters so far.

        Raises TrainingError instead of letting a checkpoint keep what is broken.
        """
        self._check()
        tensors = {f"buffer/{name}": tensor for name, tensor in self.trainable.buffers().items()}
        if self.before is not None:
            tensors["before"] = self.before
        for name, parameter in self.trainable.parameters().items():
            tensors[f"parameter/{name}"] = parameter
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam/{key}/{name}"] = value
        return tensors | {f"best/{name}": tensor for name, tensor in self.best.items()}

    def restore(self, progress: Progress, tensors: dict[str, Tensor]) -> None:
        """Continues from `_tensors`. The caller restores the random state afterwards."""
        self.progress = progress
        self.before = tensors.get("before")
        self.best = {name[5:]: t for name, t in tensors.items() if name.startswith("best/")}
        self._load({name[10:]: t for name, t in tensors.items() if name.startswith("parameter/")})
        for name, buffer in self.trainable.buffers().items():
            buffer.copy_(tensors[f"buffer/{name}"])
        for name, parameter in self.trainable.parameters().items():
            if f"adam/step/{name}" in tensors:
                moments = {
                    key: tensors[f"adam/{key}/{name}"].to(parameter.device, copy=True)
                    for key in ("exp_avg", "exp_avg_sq")
                }
                self.optimizer.state[parameter] = {"step": tensors[f"adam/step/{name}"].clone(), **moments}

    @torch.no_grad()
    def _load(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.trainable.parameters().items():
            parameter.copy_(tensors[name])

    def _emit_metrics(self, loss: float, rate: float) -> None:
        progress = self.progress
        run_step = self.first_step + progress.step
        self._emit(
            "METRICS",
            f"Step {run_step} of {self.total_steps}: loss {loss:.4f}",
            step=run_step,
            total_steps=self.total_steps,
            epoch=(progress.step - 1) // self.steps_per_epoch + 1,
            loss=loss,
            learning_rate=rate,
            tokens=progress.tokens,
            seconds=round(progress.seconds, 3),
        )

    def _emit(self, code: Any, message: str, *, level: Any = "info", **data: Any) -> None:
        data = {"stage": self.stage.type, "stage_index": self.index, **data}
        self.hooks.on_event(Event(code=code, message=message, data=data, level=level))
