"""What a stage ended with, used again by later runs: a sweep over stage 2 pays for stage 1 once.

A result is addressed by the SHA-256 of everything that went into it: the base, the rows in their order, the settings
of the stage and of all stages before it, the seed, this package's own code and its libraries. Settings count as
resolved, so "auto" and what it stands for are the same. Rows that do not train count too, for what is kept carries
their scores; so no run is told a figure of other rows.

Left out is what moves rounding alone: the number of threads, the model of processor or GPU, and what free memory
decides (the cache's rung, the size of passes; with dropout, which masks are drawn). A result that another machine made
is as good as a checkpoint from there.

It does NOT know where results are kept: that is a StageStore.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from heft_engine.adapters.adapter import Boundary
from heft_engine.adapters.lora.weights import LoraWeights
from heft_engine.bundle.format import Bundle, package_versions, read_bundle
from heft_engine.data.encoding import Example, tokenizer_hash
from heft_engine.errors import BundleError
from heft_engine.evaluation.calibration import Calibration
from heft_engine.events import Event
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.model_files import weights_hash
from heft_engine.runtime.devices import dtype_name, kernels_enabled
from heft_engine.runtime.sealed_directory import load_state
from heft_engine.training.activation_store import ActivationStore, StageActivations
from heft_engine.training.checkpoint import CheckpointWriter, RunState, rows_hash, write_stage
from heft_engine.training.run_events import tell_evaluation, tell_warnings

if TYPE_CHECKING:
    from heft_engine.training.run import Run


#: Settings that count as what they came to, or not at all (the method's name). A new one counts unless it is here.
_ELSEWHERE = {"model", "method", "stages", "task", "max_length", "dtype"}


#: Of files whose content may change numbers; .pyc: packages without their source.
_SOURCE_SUFFIXES = {".py", ".pyc", ".cpp", ".h"}


class StageStore(Protocol):
    """Results by key. What it gives is verified; what it can't give is a miss."""

    def find(self, keys: Sequence[str]) -> list[Path]:
        """The directories of the first so many keys, up to the first that is not there."""

    def keep(self, key: str, write: Callable[[Path], None]) -> None:
        """Keeps what `write` puts into an empty directory, whole or not at all. May raise OSError."""


@dataclass(frozen=True, kw_only=True)
class _Result:
    """What is kept of a stage's end: where the run stood, and its bundle."""

    state: RunState
    bundle: Bundle
    interventions: list[PlacedIntervention]


class Reuse:
    """One run's dealings with a store. Made after the run has resumed, if it does."""

    def __init__(self, run: Run, store: StageStore, prefills: ActivationStore | None = None) -> None:
        self._run = run
        self._store = store
        self._prefills = prefills
        keys = stage_keys(run)
        if not run.state.evaluations:
            run.state.keys = keys
        # A checkpoint goes on under newer code, or beside other test rows; what comes of it is nobody else's result.
        self._keys = keys if run.state.keys == keys else None

    def key(self, index: int) -> str | None:
        """What the end of this stage may be kept under; None if it may not."""
        return None if self._keys is None else self._keys[index]

    def prefills(
        self, standing: Sequence[PlacedIntervention], boundary: Boundary, examples: Sequence[Example]
    ) -> StageActivations | None:
        """Where the prefills of rows are kept for stages like this one, that train nothing but fresh interventions.

        Keyed by the weights as they stand (a stage's key would not do: its result may round otherwise each time it is
        trained), the rows, and where each row's suffix begins. `standing`: interventions of earlier stages.
        """
        if self._prefills is None:
            return None
        run = self._run
        ingredients = {
            **_of_model(run),
            "threads": torch.get_num_threads(),
            "adapters": [_of_adapter(adapter) for adapter in run.adapters],
            "sites": [_of_intervention(placed) for placed in standing],
            "rows": rows_hash(examples),
            "skipped": [boundary.first_token(len(example.prompt)) for example in examples],
        }
        return self._prefills.of(_digest([self._prefills.owner, ingredients]))

    def take(self, writer: CheckpointWriter) -> None:
        """Puts the run, if it has yet to begin, behind the longest prefix of its stages that is kept.

        Every stage of it is told, scored and saved as if it had just ended.
        """
        if self._run.state.evaluations or self._keys is None:
            return
        for index, result in enumerate(list(self._read(self._keys))):
            self._stand_behind(index, result, writer)
        for adapter in self._run.adapters:
            adapter.merge_into(self._run.lm.model)

    def keep(self, index: int) -> None:
        """Keeps the result of the stage that has just ended. A store that can't is no reason to fail."""
        run, key = self._run, self.key(index)
        if key is None:
            return
        try:
            self._store.keep(key, lambda path: write_stage(path, run.state, run.config, run.outcome))
        except (OSError, SafetensorError) as error:
            message = f"What stage {index + 1} ended with could not be kept for later runs: {error}"
            data = {
                "signature": "stage_not_kept",
                "stage": run.config.stages[index].type,
                "stage_index": index,
            }
            run.on_event(Event(code="WARNING", message=message, level="warn", data=data))

    def _read(self, keys: list[str]) -> Iterator[_Result]:
        """Results until one can't be read, or is not what its key says."""
        for count, path in enumerate(self._store.find(keys), 1):
            try:
                values, _ = load_state(path)
                bundle = read_bundle(path / "bundle")
                interventions = [stored.restore(self._run.lm.hidden_size) for stored in bundle.interventions]
            except BundleError:
                return
            if values["keys"][:count] != keys[:count] or values["stage_index"] != count:
                return
            # What this run trains is still to come, on the threads that this process has.
            values |= {"keys": keys, "trained_tokens": 0, "threads": torch.get_num_threads()}
            del values["config"]
            yield _Result(state=RunState(**values), bundle=bundle, interventions=interventions)

    def _stand_behind(self, index: int, result: _Result, writer: CheckpointWriter) -> None:
        run, stage = self._run, self._run.config.stages[index]
        run.state = result.state
        run.state.costs = [{**cost, "reused": True} for cost in result.state.costs]
        run.adapters = list(result.bundle.adapters)
        run.lm.interventions.clear()
        run.lm.interventions.extend(result.interventions)
        run.probed = (index + 1, result.bundle.probe, result.bundle.info.probe_tolerance)
        record = result.bundle.info.calibration
        run.calibrated = (index + 1, Calibration(**record) if record is not None else None)
        step = run.first_steps[index + 1]
        if index == 0:
            tell_evaluation(run, run.state.evaluations[0], reused=True)
        where = {"stage": stage.type, "stage_index": index, "step": step, "total_steps": run.total_steps}
        message = f"Stage {index + 1} of {len(run.config.stages)}: {stage.type}, taken from an equal stage"
        data = {**where, "epoch": stage.n_epochs, "key": self.key(index)}
        run.on_event(Event(code="STAGE_REUSED", message=message, data=data))
        tell_evaluation(run, run.state.evaluations[-1], reused=True, step=step)
        tell_warnings(run, index)
        run.save_stage(writer, index)


def stage_keys(run: Run) -> list[str]:
    """The key of what each stage will end with, in order."""
    config = run.config.model_dump(mode="json")
    settings = {name: value for name, value in config.items() if name not in _ELSEWHERE}
    ingredients: dict[str, Any] = {
        **_of_model(run),
        "tokenizer": tokenizer_hash(run.encoder.tokenizer),
        "task": run.encoder.task.to_json(),
        "max_length": run.encoder.max_length,
        "settings": settings,
        "split": run.split,
        "training": examples_hash(run.examples),
        "validation": examples_hash(run.questions),
        "reported": examples_hash(run.reported),
        "probes": examples_hash([*run.probe, *(example for _, example in run.probe_rows)]),
        "general": examples_hash(run.general),
    }
    prefixes = (config["stages"][: count + 1] for count in range(len(config["stages"])))
    return [_digest([ingredients, stages]) for stages in prefixes]


def _of_model(run: Run) -> dict[str, Any]:
    """What computes: the base, this code, its libraries."""
    return {
        "code": code_hash(),
        "kernels": kernels_enabled(),
        "versions": package_versions(),
        "device": run.lm.device.type,
        "dtype": dtype_name(run.lm.dtype),
        "float32_products": torch.get_float32_matmul_precision(),
        "weights": weights_hash(run.base.path),
        "config": hashlib.sha256((run.base.path / "config.json").read_bytes()).hexdigest(),
    }


def _of_adapter(adapter: LoraWeights) -> Any:
    """What a merge depends on."""
    tensors = {name: [_bits(factor) for factor in factors] for name, factors in adapter.factors.items()}
    magnitudes = {name: _bits(tensor) for name, tensor in (adapter.magnitudes or {}).items()}
    return [adapter.scaling, tensors, magnitudes]


def _of_intervention(placed: PlacedIntervention) -> Any:
    tensors = {name: _bits(tensor) for name, tensor in placed.intervention.state_dict().items()}
    return [placed.layer, placed.positions, placed.intervention.kind, tensors]


def _bits(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest() + str(tuple(tensor.shape))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def examples_hash(examples: Sequence[Example]) -> str:
    """SHA-256 over all that is known of the examples, in their order."""
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
