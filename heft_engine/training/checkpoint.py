"""What a checkpoint of a run holds, how it is written and how it is read back.

    state.json, state.safetensors   where the run stands, the stage in training, the random state
    stages/                         adapters merged and interventions in place so far (kind "step")
    bundle/                         the same as a complete bundle (kind "stage", at the end of a stage)
    manifest.json                   SHA-256 of every file, written last

It does NOT know how a stage is trained.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor

from heft_engine.adapters.lora.weights import LoraWeights
from heft_engine.bundle.format import StoredIntervention, read_stages, write_stages
from heft_engine.config.train import TrainConfig
from heft_engine.data.encoding import Example
from heft_engine.errors import BundleError
from heft_engine.events import Event, OnEvent
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.runtime.sealed_directory import load_state, prune, save_state, seal, verify
from heft_engine.training.loop import Progress

if TYPE_CHECKING:
    from heft_engine.training.loop import TrainLoop

#: Local directories inside stages that are kept: the newest and, should it be damaged, the one before. The ends
#: of stages stay, they are few and models in their own right.
KEEP = 2
_STEPS, _ANY = "????????-0-*-step", "????????-[01]-*-st*"


@dataclass(kw_only=True)
class RunState:
    """Where a run stands between steps; JSON values only, but for the tensors of the stage in training."""

    rows_sha256: str  #: of the training examples: a checkpoint of other rows would go on without a word
    #: Of what the stages will end with (heft_engine.training.stage_cache), as known when the run began; none if it
    #: reuses nothing.
    keys: list[str] = field(default_factory=list)
    stage_index: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    parity: list[dict[str, Any]] = field(default_factory=list)
    general_loss: list[float] = field(default_factory=list)
    trained_tokens: int = 0
    losses: dict[str, float] = field(
        default_factory=dict
    )  #: Progress.losses of the last stage that has ended
    costs: list[dict[str, Any]] = field(
        default_factory=list
    )  #: of each stage that has ended (heft_engine.training.costs)
    threads: int = field(default_factory=torch.get_num_threads)
    inside_stage: dict[str, Any] | None = None  #: the stage's Progress, when one is in training
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def inside(self, progress: dict[str, Any], interventions: int) -> dict[str, Any]:
        """This state as JSON values, in the middle of a stage that found `sites` interventions in place."""
        values = {name: value for name, value in vars(self).items() if name != "tensors"}
        return {**values, "inside_stage": {"progress": progress, "sites": interventions}}

    def restore_stage(self, run: TrainLoop) -> None:
        """Puts a freshly attached stage back where its checkpoint left it; the random state comes last."""
        assert self.inside_stage is not None
        run.restore(Progress.of(self.inside_stage["progress"]), self.tensors)
        torch.set_rng_state(self.tensors["rng"])
        self.inside_stage, self.tensors = None, {}


@dataclass(frozen=True, kw_only=True)
class Restored:
    state: RunState
    adapters: list[LoraWeights]
    interventions: list[StoredIntervention]


@dataclass(kw_only=True)
class CheckpointWriter:
    """Writes a run's checkpoints into `directory` (nowhere, when None) and says so."""

    directory: Path | None
    seconds: float
    on_event: OnEvent
    last: float = field(default_factory=time.monotonic)

    def is_due(self, due: bool) -> bool:
        return self.directory is not None and (due or time.monotonic() - self.last >= self.seconds)

    def step(
        self,
        values: dict[str, Any],
        run_step: int,
        config: TrainConfig,
        tensors: dict[str, Tensor],
        adapters: list[LoraWeights],
        interventions: list[PlacedIntervention],
        stage: str,
    ) -> None:
        """Inside a stage."""
        path = self._path(run_step, "step")
        save_state(path, {**values, "config": config.model_dump()}, tensors)
        write_stages(path / "stages", adapters, interventions)
        losses = Progress.of(values["inside_stage"]["progress"]).losses
        self._seal(path, run_step, "step", stage, values["stage_index"], losses)

    def stage(
        self,
        state: RunState,
        run_step: int,
        config: TrainConfig,
        write_bundle: Callable[[Path], Any],
        stage: str,
        index: int,
        key: str | None,
    ) -> None:
        """At the end of a stage: also a bundle that can be asked. `key`: what later runs may find it by."""
        if self.directory is None:
            return
        path = self._path(run_step, "stage")
        write_stage(path, state, config, write_bundle)
        self._seal(path, run_step, "stage", stage, index, state.losses, key)

    def _path(self, run_step: int, kind: str) -> Path:
        assert self.directory is not None
        # "step" sorts behind "stage", but the end of a stage comes after its last step. The last step of an epoch
        # may be saved twice, and whoever reads the first must not see it change.
        order = 1 if kind == "stage" else 0
        names = (f"{run_step:08d}-{order}-{number}-{kind}" for number in itertools.count())
        path = next(path for name in names if not (path := self.directory / name).exists())
        path.mkdir(parents=True)
        return path

    def _seal(
        self,
        path: Path,
        run_step: int,
        kind: str,
        stage: str,
        index: int,
        losses: dict[str, float],
        key: str | None = None,
    ) -> None:
        seal(path)
        self.last = time.monotonic()
        assert self.directory is not None
        prune(self.directory, KEEP, sealed=_STEPS, unsealed=_ANY)
        data: dict[str, Any] = {"stage": stage, "stage_index": index, "step": run_step, "kind": kind}
        data |= {"path": str(path), "metrics": {"step": run_step, **losses}}
        data |= {"key": key} if key is not None else {}
        self.on_event(Event(code="CHECKPOINT_SAVED", message=f"Checkpoint at step {run_step}", data=data))


def write_stage(
    path: Path, state: RunState, config: TrainConfig, write_bundle: Callable[[Path], Any]
) -> None:
    """The end of a stage: where the run stands, and its bundle. The directory is still to be sealed."""
    values = {name: value for name, value in asdict(state).items() if name != "tensors"}
    save_state(path, {**values, "config": config.model_dump()}, {})
    write_bundle(path / "bundle")


def rows_hash(examples: Sequence[Example]) -> str:
    """SHA-256 over the examples' tokens."""
    total = hashlib.sha256()
    for example in examples:
        for tokens in (example.prompt, *example.answers):
            total.update(array("q", [len(tokens), *tokens]).tobytes())
    return total.hexdigest()


def load_checkpoint(path: Path, config: TrainConfig, rows_sha256: str) -> Restored:
    """Reads and verifies a checkpoint of a run of this very config and rows. Raises BundleError otherwise."""
    verify(path)
    values, tensors = load_state(path)
    if not _same_settings(values.pop("config"), config):
        raise BundleError("this checkpoint belongs to a run with other settings")
    if values["rows_sha256"] != rows_sha256:
        raise BundleError("this checkpoint belongs to a run with other training rows")
    inside = values["inside_stage"]
    adapters, interventions = read_stages(path / ("bundle" if inside is None else "stages"))
    # Bits of a matrix product may depend on how it was cut: go on with as many threads as began.
    torch.set_num_threads(values["threads"])
    return Restored(state=RunState(**values, tensors=tensors), adapters=adapters, interventions=interventions)


def _same_settings(stored: dict[str, Any], config: TrainConfig) -> bool:
    """Compared as settings, not as JSON: an older version's checkpoint does not name what has been added since."""
    try:
        return TrainConfig.model_validate(stored) == config
    except ValidationError:
        return False
