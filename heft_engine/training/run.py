"""One run, from rows to bundle: the recipe's stages in order, each on the frozen result of those before it.

A LoRA stage ends merged; a ReFT stage leaves an intervention in place that later stages train through. Paths and a
config come in, a bundle comes out. It does NOT know HTTP, databases or users.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from heft_engine.adapters.adapter import Adapter, Merge
from heft_engine.adapters.lora.weights import LoraWeights
from heft_engine.adapters.parity import PROBE_ROWS
from heft_engine.adapters.registry import attach
from heft_engine.bundle.format import Bundle, Probe
from heft_engine.config.run_file import RunOptions
from heft_engine.config.train import Stage, TrainConfig
from heft_engine.data.encoding import Encoder, Example
from heft_engine.data.general_text import general_examples
from heft_engine.data.rows import Row
from heft_engine.errors import ConfigError
from heft_engine.evaluation.calibration import Calibration
from heft_engine.evaluation.evaluate import evaluate, mean_loss
from heft_engine.events import Event, OnEvent, Pulse
from heft_engine.inference.scoring import Scores
from heft_engine.model.base_models import BaseModel, resolve
from heft_engine.model.packed_lm import PackedLM
from heft_engine.runtime.devices import choose_device
from heft_engine.training.activation_store import ActivationStore
from heft_engine.training.cache_plan import CacheBudget
from heft_engine.training.checkpoint import CheckpointWriter, RunState, load_checkpoint, rows_hash
from heft_engine.training.costs import cost_of, outcomes
from heft_engine.training.loop import Progress
from heft_engine.training.memory_plan import peak
from heft_engine.training.result import max_new_tokens, on_validation, write_outcome
from heft_engine.training.run_events import announce, tell_evaluation, tell_plan, tell_warnings
from heft_engine.training.schedule import derived_seed
from heft_engine.training.setup import PROBE_CANDIDATES, load
from heft_engine.training.stage import planner_of, train_stage
from heft_engine.training.stage_cache import Reuse, StageStore


def train(
    config: TrainConfig,
    train_rows: Sequence[Row],
    eval_rows: Sequence[Row],
    out_dir: Path,
    on_event: OnEvent,
    *,
    test_rows: Sequence[Row] = (),
    options: RunOptions | None = None,
    stage_store: StageStore | None = None,
    activations: ActivationStore | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Bundle:
    """Trains the stages of a config and writes a bundle to `out_dir`, a new or empty directory.

    `eval_rows` decide early stopping and `test_rows` are only reported. `stage_store` holds the results of stages of
    earlier runs: a new run starts after the longest prefix of its stages found there, and stores its own results.
    `activations`: frozen activations that runs on this machine share; used only with a `stage_store`.
    Raises EngineError: RowError, ConfigError, ModelError, TrainingError, or Stopped after `should_stop` returned True
    and a checkpoint was written.
    """
    options = options or RunOptions()
    if out_dir.exists() and any(out_dir.iterdir()):
        raise ConfigError(f"{out_dir} is not empty: a bundle needs a directory of its own", param="out")
    base = resolve(
        config.model,
        model_dir=options.model_dir,
        cache_dir=options.cache_dir,
        allow_paths=options.allow_paths,
    )
    cache = CacheBudget(
        memory=options.cache_memory_bytes,
        disk=options.cache_disk_bytes,
        directory=out_dir.parent,
        sharers=options.sharers,
    )
    device = options.device or choose_device()
    run = prepare(config, base, train_rows, eval_rows, test_rows, device, on_event, cache)
    run.cache_dir, run.memory_bytes = options.cache_dir, options.memory_bytes
    run.writes_validation = options.evaluate_validation
    writer = CheckpointWriter(
        directory=options.checkpoint_dir, seconds=options.checkpoint_seconds, on_event=on_event
    )
    if options.resume is not None:
        run.resume(options.resume)
    run.reuse = Reuse(run, stage_store, activations) if stage_store is not None else None
    return run.go(out_dir, writer, should_stop)


def prepare(
    config: TrainConfig,
    base: BaseModel,
    train_rows: Sequence[Row],
    eval_rows: Sequence[Row],
    test_rows: Sequence[Row],
    device: str,
    on_event: OnEvent,
    cache: CacheBudget,
) -> Run:
    """Resolves a config against its base and rows: everything loaded, nothing trained. Raises as `train` does."""
    loaded = load(config, base, train_rows, eval_rows, test_rows, device)
    return Run(**vars(loaded), on_event=on_event, cache=cache)


def _prompt_length(example: Example) -> int:
    return len(example.prompt)


@dataclass(kw_only=True)
class Run:
    """A prepared run. `state` is what a checkpoint carries besides the stage in training."""

    config: TrainConfig  #: its stages resolved
    base: BaseModel
    lm: PackedLM
    encoder: Encoder
    examples: list[Example]
    validation: list[Example]
    questions: list[Example]  #: the validation rows with every label
    reported: list[Example]
    split: str
    probe_row_source: list[Row]
    on_event: OnEvent
    cache: CacheBudget
    state: RunState = field(init=False)
    probed: tuple[int, Probe, float] | None = (
        None  #: after which stage, the probe rows' scores, their tolerance
    )
    scored: tuple[int, tuple[Scores, ...]] | None = None  #: after which stage, the reported rows' scores
    chosen: tuple[Scores, ...] | None = None  #: those of the validation rows that it was last calibrated on
    calibrated: tuple[int, Calibration | None] | None = None  #: after which stage, what came of it
    adapters: list[LoraWeights] = field(default_factory=list)
    cache_dir: Path | None = None
    memory_bytes: int | None = None
    writes_validation: bool = False
    reuse: Reuse | None = None

    def __post_init__(self) -> None:
        self.state = RunState(rows_sha256=rows_hash(self.examples))
        self.lm.on_forward = Pulse(self.on_event)
        self.probe = sorted(self.examples[:PROBE_CANDIDATES], key=_prompt_length)[:PROBE_ROWS]
        rows = [(row, example) for row in self.probe_row_source for example in self.encoder.encode(row)]
        self.probe_rows = sorted(rows, key=lambda pair: _prompt_length(pair[1]))[:PROBE_ROWS]
        self.general = [example.supervised() for example in general_examples(self.encoder)]
        per_stage = [
            stage.n_epochs * -(-len(self.examples) // stage.batch_size) for stage in self.config.stages
        ]
        self.first_steps = [sum(per_stage[:index]) for index in range(len(per_stage) + 1)]

    @property
    def total_steps(self) -> int:
        return self.first_steps[-1]

    def resume(self, checkpoint: Path) -> None:
        """Rebuilds the state of a checkpoint: merges what was merged, hooks in what was left in place."""
        restored = load_checkpoint(checkpoint, self.config, self.state.rows_sha256)
        self.state = restored.state
        for adapter in restored.adapters:
            adapter.merge_into(self.lm.model)
        self.adapters = restored.adapters
        self.lm.interventions.extend(stored.restore(self.lm.hidden_size) for stored in restored.interventions)

    def go(self, out_dir: Path, writer: CheckpointWriter, should_stop: Callable[[], bool]) -> Bundle:
        announce(self)
        if self.reuse is not None:
            self.reuse.take(writer)
        if not self.state.evaluations:
            self.state.general_loss.append(mean_loss(self.lm, self.general))
            self._evaluate("base", None)
        for index in range(self.state.stage_index, len(self.config.stages)):
            self._stage(index, writer, should_stop)
        bundle = self.outcome(out_dir)
        data = {
            "bundle": str(out_dir),
            "evaluation": bundle.info.evaluation,
            "parity": {"merges": bundle.info.parity},
            "trained_tokens": self.state.trained_tokens,
            "costs": self.state.costs,
            "outcomes": outcomes(self, on_validation(self)),
        }
        self.emit("SUCCEEDED", "The model is ready", **data)
        return bundle

    # -- a stage ----------------------------------------------------------------------------------------------------

    def _stage(self, index: int, writer: CheckpointWriter, should_stop: Callable[[], bool]) -> None:
        stage = self.config.stages[index]
        began = time.monotonic()
        interventions_before = len(list(self.lm.interventions))
        torch.manual_seed(derived_seed(self.config.seed, index))
        trainable = attach(self.lm, stage)
        inside = self.state.inside_stage
        earlier = Progress.of(inside["progress"]) if inside is not None else None
        with peak(self.lm.device) as most:
            with planner_of(self, index, trainable).planned(earlier) as plan:
                tell_plan(self, index, trainable, plan)
                progress, saved = train_stage(
                    self, index, trainable, plan, interventions_before, writer, should_stop
                )
            seconds = time.monotonic() - began + (earlier.seconds if earlier is not None else 0)
            self.state.costs.append(cost_of(self, index, trainable, progress, seconds + saved))
            self._end_stage(index, stage, trainable, progress)
            memory_bytes = most()
        tell_warnings(self, index)
        self.emit_stage(
            "STAGE_COMPLETE",
            f"Stage {index + 1} of {len(self.config.stages)} is complete",
            index,
            seconds=round(time.monotonic() - began, 3),
            steps=progress.step,
            tokens=progress.tokens,
            general_loss=self.state.general_loss[-1],
            memory_bytes=memory_bytes,
            flops=self.state.costs[-1]["flops"],
        )
        self.save_stage(writer, index, self.reuse.key(index) if self.reuse is not None else None)
        if self.reuse is not None:
            self.reuse.keep(index)

    def save_stage(self, writer: CheckpointWriter, index: int, key: str | None = None) -> None:
        """Writes the checkpoint of a stage's end. `key`: what later runs may find it by."""
        kind, step = self.config.stages[index].type, self.first_steps[index + 1]
        writer.stage(self.state, step, self.config, self.outcome, kind, index, key)

    def outcome(self, path: Path) -> Bundle:
        """Writes the bundle of the result so far."""
        return write_outcome(self, path)

    def _end_stage(
        self,
        index: int,
        stage: Stage,
        trainable: Adapter,
        progress: Progress,
    ) -> None:
        """Merges or freezes what was trained, and measures it."""
        merge = trainable.finish(self.probe)
        if merge is not None:
            self._record_merge(index, merge)
        self.state.trained_tokens += progress.tokens
        self.state.losses = progress.losses
        self.state.stage_index, self.state.inside_stage = index + 1, None
        self._evaluate(stage.type, index)
        self.state.general_loss.append(mean_loss(self.lm, self.general))

    def _record_merge(self, index: int, merge: Merge) -> None:
        self.adapters.append(merge.weights)
        self.state.parity.append({"stage_index": index, **merge.record})
        message = f"Merged; float32 logits differ from the adapter's by {merge.record['float32']:.1e}"
        self.emit_stage("MERGE_VERIFIED", message, index, **merge.record)

    def _evaluate(self, stage: str, index: int | None) -> None:
        if not self.reported:
            self.state.evaluations.append({"stage": stage, "stage_index": index})
            return
        result = evaluate(self.lm, self.encoder, self.reported, max_new_tokens=max_new_tokens(self))
        self.scored = (self.state.stage_index, result.scores)
        record = {"stage": stage, "stage_index": index, **result.to_json(), **result.packed_rows()}
        self.state.evaluations.append(record)
        tell_evaluation(self, record)

    def emit_stage(self, code: Any, message: str, index: int, **data: Any) -> None:
        self.emit(code, message, stage=self.config.stages[index].type, stage_index=index, **data)

    def emit(self, code: Any, message: str, **data: Any) -> None:
        self.on_event(Event(code=code, message=message, data=data))
