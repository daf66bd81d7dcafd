"""The training loop, one for every adapter and every objective.

The loss of an optimizer step is the sum over its micro-batches divided by the objective's count, however the step was
cut. The same seed gives the same losses, step for step, and a stage that resumes from a checkpoint ends with the same
weights, bit for bit (float32 on a CPU).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heft_engine.adapters.adapter import Adapter
from heft_engine.config.train import EarlyStopping, Stage
from heft_engine.errors import OutOfMemory, Stopped, TrainingError
from heft_engine.events import Event, OnEvent
from heft_engine.model.loss import LossSums
from heft_engine.model.packing import packed_length
from heft_engine.objectives.objective import Objective
from heft_engine.runtime.distributed import SINGLE_PROCESS, Ranks
from heft_engine.runtime.random_state import RandomState
from heft_engine.training.best_epoch import BestEpoch
from heft_engine.training.data_parallel.exchange import Exchange
from heft_engine.training.failure_signatures import divergence_message, overflow_message
from heft_engine.training.forward_pass import ForwardPass, added_up, loss_sums, probe_states, split_by_tokens
from heft_engine.training.optimization.optimizer import StageOptimizer
from heft_engine.training.progress import Progress
from heft_engine.training.schedule import epoch_order, learning_rate_at
from heft_engine.training.smaller_passes import run_in_smaller_passes

#: After so many steps (or at the end of a shorter stage) the hidden states of probe rows must have changed.
TRAINS_AFTER = 20


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """Callbacks of the loop: to publish events, to save checkpoints, and to ask whether to stop."""

    on_event: OnEvent
    #: Takes the progress, a function that returns the tensors, and whether to save whatever the clock says.
    save: Callable[[Progress, Callable[[], dict[str, Tensor]], bool], None]
    should_stop: Callable[[], bool]
    #: Takes the progress at the end of each epoch but the stage's last.
    save_epoch: Callable[[Progress], None] = lambda _: None
    #: Returns the share of right answers on validation rows, for early stopping by it. Called on rank 0.
    valid_accuracy: Callable[[], float | None] = lambda: None


@dataclass(kw_only=True)
class TrainLoop:
    """One stage's training."""

    stage: Stage
    index: int  #: of the stage in its run
    seed: int
    adapter: Adapter
    objective: Objective
    forward: ForwardPass  #: of the training examples
    validation: ForwardPass  #: of the validation examples, maybe none
    early_stopping: EarlyStopping | None
    first_step: int  #: optimizer steps of the run before this stage
    total_steps: int  #: of the whole run
    hooks: Hooks
    stages_before: int = 0  #: stages of the model that the run goes on from: random draws go on too
    ranks: Ranks = SINGLE_PROCESS  #: the processes that share the rows of each step
    progress: Progress = field(default_factory=Progress)
    probe_before: Tensor | None = None  #: hidden states of the probe rows before the first step

    def __post_init__(self) -> None:
        self.optimizer = StageOptimizer(
            self.stage, self.adapter.parameters(), self.adapter.no_decay(), self.forward.lm.dtype
        )
        self._best_epoch = BestEpoch(settings=self.early_stopping)
        self._exchange = Exchange(
            ranks=self.ranks,
            seed=self.seed,
            stage_index=self.stages_before + self.index,
            stop_requested=self.hooks.should_stop,
        )

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.forward.examples) / self.stage.batch_size)

    @property
    def stage_steps(self) -> int:
        return self.stage.n_epochs * self.steps_per_epoch

    def run(self) -> None:
        """Trains to the end. Raises Stopped after a checkpoint, TrainingError when training can't succeed."""
        self.adapter.train(False)  # fresh modules are in training mode: dropout would change the probe rows
        if self.probe_before is None and self.ranks.is_first:
            self.probe_before = probe_states(self.forward)
        self._exchange.check_same(self.adapter.parameters())
        while self.progress.epoch < self.stage.n_epochs and not self.progress.finished:
            for rows in self._remaining_batches():
                started = time.monotonic()
                learning_rate = learning_rate_at(self.stage, self.progress.step, self.stage_steps)
                loss, correct, count = self._train_step(rows, learning_rate)
                tokens = sum(packed_length(self.forward.examples[row]) for row in rows)
                seconds = time.monotonic() - started
                self.progress.add_step(loss, correct, count, tokens=tokens, seconds=seconds)
                self._warn_of_divergence(loss / count)
                self._emit_metrics(loss / count, correct / count, learning_rate)
                if self.progress.step == min(TRAINS_AFTER, self.stage_steps):
                    self._check_trains()
                self._save_or_stop()
            self._end_epoch()
        if self.progress.step < TRAINS_AFTER:
            self._check_trains()  # early stopping ended it before the usual step
        if best := self._best_epoch.take(self.progress):
            self._load(best)
        self._check_parameters()

    # -- one step ---------------------------------------------------------------------------------------------------

    def _remaining_batches(self) -> Iterator[list[int]]:
        """Yields the rows of each optimizer step of this epoch that is still to come."""
        size = self.stage.batch_size
        place = self.stages_before + self.index
        order = epoch_order(self.seed, place, self.progress.epoch, len(self.forward.examples))
        done = self.progress.step - self.progress.epoch * self.steps_per_epoch
        for start in range(done * size, len(order), size):
            yield order[start : start + size]

    def _train_step(self, rows: Sequence[int], learning_rate: float) -> tuple[float, float, int]:
        """Takes one optimizer step. Returns what `_forward_backward` returns.

        Where gradients of a scaled loss overflow, the step is taken with a lower scale, on the same rows and with the
        same random numbers. All ranks do so: they have the same summed gradients.
        """
        random_state = RandomState.current()
        while True:
            loss, correct, count = self._forward_backward(rows)
            is_finite = math.isfinite(loss / count)
            if not is_finite and not self.optimizer.loss_scale.is_used:
                raise TrainingError(divergence_message(self.stage, loss / count), code="diverged")
            if self._optimizer_step(learning_rate, random_state):
                break
            self.progress.overflows += 1
            if self.optimizer.loss_scale.is_exhausted:
                raise TrainingError(overflow_message(self.stage), param="dtype", code="diverged")
            random_state.restore()
        if not is_finite:
            raise TrainingError(divergence_message(self.stage, loss / count), code="diverged")
        return loss, correct, count

    def _forward_backward(self, rows: Sequence[int]) -> tuple[float, float, int]:
        """Accumulates the gradients of one step. Returns its summed loss, its correct tokens, and the count of all."""
        count = self.objective.count([self.forward.examples[row] for row in rows])
        share = self.forward.share(rows)

        def accumulate(token_budget: int) -> Tensor:
            self.optimizer.zero_grad()
            sums: list[LossSums] = []
            for micro_batch in split_by_tokens(self.forward.tokens, share, token_budget):
                loss, correct = loss_sums(self.forward, self.objective, micro_batch)
                self.optimizer.loss_scale.scaled(loss / count).backward()  # type: ignore[no-untyped-call]
                sums.append(LossSums(loss.detach(), correct))
            return added_up(sums, self.forward.lm.device)

        self._exchange.begin_step(self.progress.step)
        self.adapter.train(True)
        sums = self._in_smaller_passes(accumulate, self.forward, share)
        self.adapter.train(False)
        # Reads the sums, once: each read makes the host wait for the GPU.
        total, correct = self._exchange.sum_gradients(self.adapter.parameters(), sums)
        return total, correct, count

    def _optimizer_step(self, learning_rate: float, random_state: RandomState) -> bool:
        """Returns False if the step was not taken. random_state: before the step's passes."""
        try:
            return self.optimizer.step(learning_rate)
        except OutOfMemory:
            if self.optimizer.is_restored:
                random_state.restore()
                self.hooks.save(self.progress, self._tensors, True)  # nothing is lost
            raise

    # -- the end of an epoch ----------------------------------------------------------------------------------------

    def _end_epoch(self) -> None:
        progress = self.progress
        self._check_parameters()
        self._exchange.check_same(self.adapter.parameters())
        data: dict[str, Any] = {
            "step": self.first_step + progress.step,
            "total_steps": self.total_steps,
            "train_loss": progress.epoch_loss / progress.epoch_tokens,
            "train_mean_token_accuracy": progress.epoch_correct / progress.epoch_tokens,
        }
        progress.epoch += 1
        progress.epoch_loss, progress.epoch_correct, progress.epoch_tokens = 0.0, 0.0, 0
        if self.validation.examples:
            loss, accuracy = self._validation_loss()
            progress.valid_loss = loss if math.isfinite(loss) else None
            progress.valid_token_accuracy = accuracy
            if self._best_epoch.needs_accuracy:
                progress.valid_accuracy = self._exchange.from_first(self.hooks.valid_accuracy)
            data = {**progress.losses, **data, "eval_loss": progress.valid_loss}
            self._best_epoch.end_epoch(progress, self.adapter.parameters())
        message = f"Epoch {progress.epoch} of {self.stage.n_epochs}"
        if progress.finished and progress.epoch < self.stage.n_epochs:
            message += f"; the stage stops here, its best epoch was {progress.best_epoch or 'none'}"
            data["stopped_early"] = True
        self._emit("EPOCH_COMPLETE", message, epoch=progress.epoch, **data, **self.objective.report())
        if progress.epoch < self.stage.n_epochs and not progress.finished:
            self.hooks.save_epoch(progress)
        self._save_or_stop(due=True)

    @torch.inference_mode()
    def _validation_loss(self) -> tuple[float, float]:
        """Returns the mean loss of the validation rows, and their token accuracy."""
        share = self.validation.share(range(len(self.validation.examples)))

        def summed(token_budget: int) -> Tensor:
            micro_batches = split_by_tokens(self.validation.tokens, share, token_budget)
            sums = [loss_sums(self.validation, self.objective, part) for part in micro_batches]
            return added_up(sums, self.validation.lm.device)

        total, correct = self._exchange.sum(self._in_smaller_passes(summed, self.validation, share))
        count = self.objective.count(self.validation.examples)
        return total / count if math.isfinite(total) else math.inf, correct / count

    # -- failures ---------------------------------------------------------------------------------------------------

    def _in_smaller_passes(
        self, work: Callable[[int], Tensor], forward: ForwardPass, rows: Sequence[int]
    ) -> Tensor:
        """Runs passes by this rank's token budget, which is lowered for good when they run out of memory."""
        return run_in_smaller_passes(
            work, forward, rows, self.progress.token_budget, self._lower_token_budget
        )

    def _lower_token_budget(self, token_budget: int) -> None:
        message = (
            f"Stage {self.stage.type} ran out of memory in passes of up to {self.progress.token_budget} tokens. It "
            f"goes on with passes of up to {token_budget}; batch_size stays as it is"
        )
        self.progress.token_budget = token_budget
        self._emit("WARNING", message, level="warn", signature="out_of_memory")

    def _warn_of_divergence(self, loss: float) -> None:
        if self.progress.begins_to_diverge(loss):
            message = divergence_message(self.stage, self.progress.running or loss)
            self._emit("WARNING", message, level="warn", signature="diverges")

    def _check_parameters(self) -> None:
        """Raises TrainingError for parameters that are not finite (the last step may do it) or break an invariant."""
        are_finite = [parameter.isfinite().all() for parameter in self.adapter.parameters().values()]
        if not torch.stack([finite.to(are_finite[0].device) for finite in are_finite]).all():
            raise TrainingError(divergence_message(self.stage, math.nan), code="diverged")
        self.adapter.check()

    def _check_trains(self) -> None:
        before = self.probe_before  # of rank 0
        if not self.ranks.is_first or (before is not None and not before.equal(probe_states(self.forward))):
            return
        raise TrainingError(
            f"stage {self.stage.type} does not train: after {self.progress.step} steps its parameters have changed "
            f"nothing in the model's answers. Raise {self.stage.type}.learning_rate",
            code="does_not_train",
        )

    # -- checkpoints and events -------------------------------------------------------------------------------------

    def _save_or_stop(self, due: bool = False) -> None:
        stop = self._exchange.should_stop()
        self.hooks.save(self.progress, self._tensors, due or stop)
        if stop:
            raise Stopped("stopped at a checkpoint, as requested")

    def _buffers(self) -> dict[str, Tensor]:
        tensors = {f"buffer/{name}": tensor for name, tensor in self.adapter.buffers().items()}
        return tensors | {f"objective/{name}": tensor for name, tensor in self.objective.buffers().items()}

    def _tensors(self) -> dict[str, Tensor]:
        """Returns all that the stage continues from: raw parameters, buffers, Adam's state, the best parameters.

        Raises TrainingError for parameters that a checkpoint must not carry.
        """
        self._check_parameters()
        tensors = self._buffers()
        if self.probe_before is not None:
            tensors["before"] = self.probe_before
        for name, parameter in self.adapter.parameters().items():
            tensors[f"parameter/{name}"] = parameter
        best = {f"best/{name}": tensor for name, tensor in self._best_epoch.parameters.items()}
        return tensors | self.optimizer.tensors() | best

    def restore(self, progress: Progress, tensors: dict[str, Tensor]) -> None:
        """Continues from `_tensors`. The caller restores the random state afterwards."""
        self.progress = progress
        self.probe_before = tensors.get("before")
        self._best_epoch.parameters = _with_prefix("best/", tensors)
        self._load(_with_prefix("parameter/", tensors))
        for name, buffer in self._buffers().items():
            buffer.copy_(tensors[name])
        self.optimizer.restore(tensors)

    @torch.no_grad()
    def _load(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.adapter.parameters().items():
            parameter.copy_(tensors[name])

    def _emit_metrics(self, loss: float, accuracy: float, learning_rate: float) -> None:
        progress = self.progress
        run_step = self.first_step + progress.step
        self._emit(
            "METRICS",
            f"Step {run_step} of {self.total_steps}: loss {loss:.4f}",
            step=run_step,
            total_steps=self.total_steps,
            epoch=(progress.step - 1) // self.steps_per_epoch + 1,
            loss=loss,
            train_loss=loss,
            train_mean_token_accuracy=accuracy,
            learning_rate=learning_rate,
            tokens=progress.tokens,
            seconds=round(progress.seconds, 3),
            **self.optimizer.loss_scale.report(progress.overflows),
        )

    def _emit(self, code: Any, message: str, *, level: Any = "info", **data: Any) -> None:
        data = {"stage": self.stage.type, "stage_index": self.index, **data}
        self.hooks.on_event(Event(code=code, message=message, data=data, level=level))


def _with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
