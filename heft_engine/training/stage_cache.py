"""Results of stages, reused by later runs: a sweep over stage 2 trains stage 1 once.

A result is addressed by the SHA-256 of everything that went into it: the base, the model that the run goes on from
(by its content, not its name), the rows in their order, the settings
of the stage and of all stages before it, the seed, this package's own code and its libraries. Settings count as
resolved, so "auto" and the value it stands for are the same. Rows that are only measured on count too, because a result
includes their scores.

Left out is what changes rounding alone: the number of threads, the model of processor or GPU, and what free memory
decides (the cache's level, the size of passes; with dropout, which masks are drawn). A result that another machine
computed is as good as a checkpoint from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch

from heft_engine.adapters.lora.weights import LoraWeights
from heft_engine.bundle.content import adapter_content, tensor_hashes
from heft_engine.bundle.format import package_versions, read_bundle
from heft_engine.data.encoding import Example, tokenizer_hash
from heft_engine.errors import BundleError
from heft_engine.evaluation.calibration import Calibration
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.model_files import weights_hash
from heft_engine.runtime.devices import batch_invariance_requested, dtype_name, kernels_enabled
from heft_engine.runtime.sealed_directory import load_state
from heft_engine.training.checkpoint import RunState, rows_hash
from heft_engine.training.result import StageMeasurements
from heft_engine.training.setup import RunInputs
from heft_engine.training.stage_inputs import StageInputs

#: Settings that other ingredients of a key stand for, resolved, or that do not count (the method's name). A setting
#: that is added to TrainConfig counts unless it is named here.
_NOT_SETTINGS = {"model", "method", "stages", "task", "max_length", "dtype"}
#: Of files whose content may change numbers; .pyc: packages without their source.
_SOURCE_SUFFIXES = {".py", ".pyc", ".cpp", ".h"}


class StageStore(Protocol):
    """Stage results by key. `find` returns verified results only; it answers every failure with fewer of them."""

    def find(self, keys: Sequence[str]) -> list[Path]:
        """Returns the directories of the first keys, up to the first that is missing."""

    def put(self, key: str, write: Callable[[Path], None]) -> None:
        """Stores what `write` puts into an empty directory, completely or not at all. May raise OSError."""


@dataclass(frozen=True, kw_only=True)
class CachedStage:
    """The result of a stage that an earlier run trained: the state it left, its interventions and measurements.

    path: of its directory, until the run's store removes it.
    """

    path: Path
    state: RunState
    interventions: list[PlacedIntervention]
    measured: StageMeasurements


@dataclass(frozen=True, kw_only=True)
class StageCache:
    """A run's stages in a store. keys: one a stage; empty: none is looked up or stored."""

    store: StageStore | None = None
    keys: Sequence[str] = ()

    def key(self, index: int) -> str | None:
        return self.keys[index] if self.keys else None

    def restore(self, inputs: RunInputs) -> list[CachedStage]:
        """Returns the longest prefix of the run's stages that is stored."""
        if self.store is None or not self.keys:
            return []
        return list(_read(self.store.find(self.keys), list(self.keys), inputs))

    def put(self, index: int, write: Callable[[Path], None]) -> None:
        """Stores the result of a stage. Raises OSError and SafetensorError."""
        if self.store is not None and self.keys:
            self.store.put(self.keys[index], write)


def _read(paths: Sequence[Path], keys: list[str], inputs: RunInputs) -> Iterator[CachedStage]:
    """Yields results up to one that can't be read, or that its key does not belong to."""
    for count, path in enumerate(paths, 1):
        try:
            stage = read_stage(path, inputs)
        except BundleError:
            return
        if stage.state.keys[:count] != keys[:count] or stage.state.stage_index != count:
            return
        yield replace(stage, state=replace(stage.state, keys=keys))


def read_stage(path: Path, inputs: RunInputs) -> CachedStage:
    """Returns the result of a stage in a directory, for a run that goes on from it. Raises BundleError."""
    values, _ = load_state(path)
    bundle = read_bundle(path / "bundle")
    state = RunState.from_json(values, bundle.adapters, {})
    calibration = bundle.info.calibration
    return CachedStage(
        path=path,
        # This run has trained nothing yet, and does so on the threads of this process.
        state=replace(
            state,
            trained_tokens=0,
            threads=torch.get_num_threads(),
            processes=inputs.ranks.size,
            costs=[{**cost, "reused": True} for cost in state.costs],
        ),
        interventions=[stored.restore(inputs.lm.hidden_size) for stored in bundle.interventions],
        measured=StageMeasurements(
            probe=bundle.probe,
            probe_tolerance=bundle.info.probe_tolerance,
            calibration=Calibration(**calibration) if calibration is not None else None,
        ),
    )


def stage_keys(inputs: RunInputs) -> list[str]:
    """Returns the key of each stage's result, in order."""
    config = inputs.config.model_dump(mode="json")
    settings = {name: value for name, value in config.items() if name not in _NOT_SETTINGS}
    probes = [*inputs.merge_probes, *(example for _, example in inputs.bundle_probes)]
    ingredients: dict[str, Any] = {
        **_model_ingredients(inputs),
        "start": inputs.start.sha256 if inputs.start is not None else None,
        "tokenizer": tokenizer_hash(inputs.encoder.tokenizer),
        "task": inputs.encoder.task.to_json(),
        "max_length": inputs.encoder.max_length,
        "settings": settings,
        "split": inputs.split,
        "training": examples_hash(inputs.examples),
        "validation": examples_hash(inputs.questions),
        "reported": examples_hash(inputs.reported),
        "probes": examples_hash(probes),
        "general": examples_hash(inputs.general),
    }
    prefixes = (config["stages"][: count + 1] for count in range(len(config["stages"])))
    return [_digest([ingredients, stages]) for stages in prefixes]


def activation_key(
    inputs: RunInputs,
    adapters: Sequence[LoraWeights],
    stage: StageInputs,
    examples: Sequence[Example],
    owner: str,
) -> str:
    """Returns the key of frozen activations of `examples`, for stages that train fresh interventions only.

    It covers the weights as they are (a stage's key would not do: trained again, a stage may round otherwise), the
    rows, and where each row's suffix begins. adapters: of the stages so far. owner: who may share the activations.
    """
    boundary = stage.adapter.boundary()
    ingredients = {
        **_model_ingredients(inputs),
        "threads": torch.get_num_threads(),
        "adapters": [adapter_content(adapter) for adapter in adapters],
        "sites": [_intervention_ingredients(placed) for placed in stage.standing],
        "rows": rows_hash(examples),
        "skipped": [boundary.first_token(len(example.prompt)) for example in examples],
    }
    return _digest([owner, ingredients])


def _model_ingredients(inputs: RunInputs) -> dict[str, Any]:
    """Returns what computes: the base, this code, its libraries, the device."""
    return {
        "code": code_hash(),
        "kernels": kernels_enabled(),
        "batch_invariant": batch_invariance_requested(),
        "versions": package_versions(inputs.config.base_quantization),
        "device": inputs.lm.device.type,
        "dtype": dtype_name(inputs.lm.dtype),
        "base_quantization": inputs.config.base_quantization,
        "float32_products": torch.get_float32_matmul_precision(),
        "weights": weights_hash(inputs.base.path),
        "config": hashlib.sha256((inputs.base.path / "config.json").read_bytes()).hexdigest(),
    }


def _intervention_ingredients(placed: PlacedIntervention) -> Any:
    tensors = tensor_hashes(placed.intervention.state_dict())
    return [placed.layer, placed.positions, placed.intervention.kind, tensors]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def examples_hash(examples: Sequence[Example]) -> str:
    """Returns the SHA-256 of everything known of the examples, in their order."""
    total = hashlib.sha256(rows_hash(examples).encode())
    for example in examples:
        total.update(repr((example.labels, example.gold, example.truncated)).encode())
    return total.hexdigest()


@lru_cache(maxsize=1)
def code_hash() -> str:
    """Returns the SHA-256 of this package's Python and C++ source: any change may change numbers."""
    package = Path(__file__).parents[1]
    total = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.suffix in _SOURCE_SUFFIXES and path.parent.name != "__pycache__":
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            total.update(f"{path.relative_to(package)} {digest}\n".encode())
    return total.hexdigest()
