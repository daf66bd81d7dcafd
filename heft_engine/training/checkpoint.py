"""Checkpoints of a run: what they hold, how they are written and how they are read back.

state.json, state.safetensors   the RunState, the stage in training, torch's random state
stages/                         merged adapters and interventions in place so far (kind "step")
bundle/                         the same as a complete bundle (kind "stage", at the end of a stage), or nothing but a
                                bundle of the model inside a stage, not to resume from (kind "epoch")
manifest.json                   SHA-256 of every file, written last
"""

from __future__ import annotations

import hashlib
import itertools
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from heft_engine.adapters.adapter import Merge
from heft_engine.adapters.lora.weights import LoraWeights
from heft_engine.bundle.format import StoredIntervention, read_stages, write_stages
from heft_engine.config.train import TrainConfig
from heft_engine.data.encoding import Example
from heft_engine.errors import BundleError
from heft_engine.runtime.sealed_directory import load_state, prune, save_state, seal, verify
from heft_engine.training.progress import Progress
from heft_engine.training.stage_inputs import StageInputs

#: Step checkpoints that are kept: the newest, and the one before it should that be damaged. The ends of stages stay:
#: they are few, and models in their own right.
KEEP = 2
_STEPS, _EPOCHS, _ANY = "????????-0-*-step", "????????-0-*-epoch", "????????-[01]-*"
#: Checkpoints of epochs before the last ones are written no sooner than this after one another.
EPOCH_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class StageSnapshot:
    """A stage in the middle of its training. tensors: by TrainLoop's names, and torch's random state."""

    progress: Progress
    tensors: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The results of a run's finished stages, and the snapshot of the one in training. Interventions are the model's.

    evaluations, general_loss: of the model that the run started from and after each stage. parity: of each merge.
    adapters: merged into the base so far, those of the model that the run started from first.
    """

    rows_sha256: str  #: of the training examples: a checkpoint of other rows must not be continued
    #: Of the fine-tuned model that the run goes on from (StartModel.sha256); None: it started from a base.
    start_sha256: str | None = None
    #: Keys of the stages' results (heft_engine.training.stage_cache) when the run began; empty without a cache.
    keys: list[str] = field(default_factory=list)
    stage_index: int = 0  #: of the stage in training or next
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    parity: list[dict[str, Any]] = field(default_factory=list)
    general_loss: list[float] = field(default_factory=list)
    trained_tokens: int = 0
    losses: dict[str, float] = field(
        default_factory=dict
    )  #: Progress.losses of the last finished stage, with valid_accuracy
    #: Of each stage, by heft_engine.training.costs.stage_cost.
    costs: list[dict[str, Any]] = field(default_factory=list)
    threads: int = field(default_factory=torch.get_num_threads)
    processes: int = 1  #: that trained together
    adapters: list[LoraWeights] = field(default_factory=list)
    snapshot: StageSnapshot | None = None

    def with_base(self, evaluation: dict[str, Any], general_loss: float) -> RunState:
        """Returns the state of a run whose base has been measured."""
        return replace(self, evaluations=[evaluation], general_loss=[general_loss])

    def after_stage(
        self,
        progress: Progress,
        merge: Merge[LoraWeights] | None,
        evaluation: dict[str, Any],
        general_loss: float,
        cost: dict[str, Any],
    ) -> RunState:
        """Returns the state after the stage in training has been finished and measured."""
        merges = [merge] if merge is not None else []
        return replace(
            self,
            stage_index=self.stage_index + 1,
            evaluations=[*self.evaluations, evaluation],
            parity=[*self.parity, *({"stage_index": self.stage_index, **each.record} for each in merges)],
            general_loss=[*self.general_loss, general_loss],
            trained_tokens=self.trained_tokens + progress.tokens,
            losses=progress.losses,
            costs=[*self.costs, cost],
            adapters=[*self.adapters, *(each.weights for each in merges)],
            snapshot=None,
        )

    def to_json(self, progress: Progress | None = None, standing: int = 0) -> dict[str, Any]:
        """Returns the values of state.json. progress, standing: of the stage in training."""
        values = {name: getattr(self, name) for name in _SAVED}
        inside = {"progress": asdict(progress), "sites": standing} if progress is not None else None
        return {**values, "inside_stage": inside}

    @staticmethod
    def from_json(
        values: Mapping[str, Any], adapters: list[LoraWeights], tensors: dict[str, Tensor]
    ) -> RunState:
        """The inverse of `to_json`. Values that only other versions have are ignored."""
        inside = values["inside_stage"]
        return RunState(
            **{name: values[name] for name in _SAVED if name in values},
            adapters=adapters,
            snapshot=inside
            and StageSnapshot(progress=Progress.of(inside["progress"]), tensors=dict(tensors)),
        )


_SAVED = [each.name for each in fields(RunState) if each.name not in ("adapters", "snapshot")]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that has been read. `interventions` were in place, before the stage in training."""

    state: RunState
    interventions: list[StoredIntervention]


@dataclass(kw_only=True)
class CheckpointWriter:
    """Writes checkpoints into `directory`, each into a new one of its own; None: none are written."""

    directory: Path | None
    seconds: float  #: between two checkpoints inside an epoch
    epochs: int = 0  #: the last epochs of the run with checkpoints of their own
    last: float = field(default_factory=time.monotonic)
    last_epoch: float = field(default_factory=time.monotonic)

    def is_due(self, forced: bool) -> bool:
        return self.directory is not None and (forced or time.monotonic() - self.last >= self.seconds)

    def is_epoch_due(self, later_epochs: int) -> bool:
        """later_epochs: those with checkpoints of their own that are still to come."""
        if self.directory is None or self.epochs == 0:
            return False
        return later_epochs < self.epochs or time.monotonic() - self.last_epoch >= EPOCH_SECONDS

    def save_step(
        self, state: RunState, config: TrainConfig, stage: StageInputs, snapshot: StageSnapshot
    ) -> Path:
        """Writes a checkpoint inside a stage and returns its directory."""
        path = self._new_directory(stage.first_step + snapshot.progress.step, "step")
        values = state.to_json(snapshot.progress, len(stage.standing))
        save_state(path, {**values, "config": config.model_dump()}, snapshot.tensors)
        write_stages(path / "stages", state.adapters, list(stage.standing))
        self._seal(path)
        return path

    def save_stage(
        self, state: RunState, config: TrainConfig, run_step: int, write_bundle: Callable[[Path], Any]
    ) -> Path:
        """Writes a checkpoint at the end of a stage, with a bundle that can be served. Returns its directory."""
        path = self._new_directory(run_step, "stage")
        write_stage(path, state, config, write_bundle)
        self._seal(path)
        return path

    def save_epoch(self, run_step: int, write_bundle: Callable[[Path], Any]) -> Path:
        """Writes a bundle of the model at the end of an epoch. Returns its directory."""
        path = self._new_directory(run_step, "epoch")
        write_bundle(path / "bundle")
        seal(path)
        self.last_epoch = time.monotonic()
        prune(path.parent, max(KEEP, self.epochs), sealed=_EPOCHS, unsealed=_ANY)
        return path

    def _new_directory(self, run_step: int, kind: str) -> Path:
        assert self.directory is not None
        # "step" sorts behind "stage", but the end of a stage comes after its last step. The last step of an epoch
        # may be saved twice, and whoever reads the first must not see it change.
        order = 1 if kind == "stage" else 0
        names = (f"{run_step:08d}-{order}-{number}-{kind}" for number in itertools.count())
        path = next(path for name in names if not (path := self.directory / name).exists())
        path.mkdir(parents=True)
        return path

    def _seal(self, path: Path) -> None:
        seal(path)
        self.last = time.monotonic()
        prune(path.parent, KEEP, sealed=_STEPS, unsealed=_ANY)


def write_stage(
    path: Path, state: RunState, config: TrainConfig, write_bundle: Callable[[Path], Any]
) -> None:
    """Writes the result of a stage into `path`: the run's state, and its bundle. The caller seals the directory."""
    save_state(path, {**state.to_json(), "config": config.model_dump()}, {})
    write_bundle(path / "bundle")


def rows_hash(examples: Sequence[Example]) -> str:
    """Returns the SHA-256 of the examples' tokens."""
    total = hashlib.sha256()
    for example in examples:
        for tokens in (example.prompt, *example.answers):
            total.update(array("q", [len(tokens), *tokens]).tobytes())
    return total.hexdigest()


def load_checkpoint(
    path: Path, config: TrainConfig, rows_sha256: str, start_sha256: str | None
) -> Checkpoint:
    """Reads and verifies a checkpoint of a run of the same config and rows, which went on from the same model.

    Raises BundleError for a damaged checkpoint, or one of another run.
    """
    verify(path)
    values, tensors = load_state(path)
    if not _same_settings(values["config"], config):
        raise BundleError("this checkpoint belongs to a run with other settings")
    if values["rows_sha256"] != rows_sha256:
        raise BundleError("this checkpoint belongs to a run with other training rows")
    if values.get("start_sha256") != start_sha256:
        raise BundleError("this checkpoint belongs to a run that started from another model")
    adapters, interventions = read_stages(path / ("bundle" if values["inside_stage"] is None else "stages"))
    return Checkpoint(state=RunState.from_json(values, adapters, tensors), interventions=interventions)


def _same_settings(stored: dict[str, Any], config: TrainConfig) -> bool:
    """Compares settings rather than JSON: checkpoints of older versions lack settings that were added later."""
    try:
        return TrainConfig.model_validate(stored) == config
    except ValidationError:
        return False
