"""Rough estimates of a study's compute, memory and disk, before any of it is run.

Compute is that of heft_engine.config.flops for rows of an assumed length; neither files nor models are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from heft_engine.config.flops import CacheLevel, RowTokens, Shape, StageWork, stage_flops
from heft_engine.config.train import LoraStage, ReftStage, Stage
from store import ids, models
from store.errors import NotFound
from store.jobs.shared_prefix import prefix_keys
from store.storage import files
from store.studies.arms import PlannedArm
from store.studies.plan import plan
from store.studies.spec import StudySpec
from store.studies.studies import base_model_info

#: Llama-2-7B and BoolQ's training rows: the paper's run can be estimated without a worker that has them.
_LLAMA = {"n_layers": 32, "hidden_size": 4_096, "parameters": 6_738_415_616, "vocab_size": 32_000}
_KNOWN_MODELS = {"meta-llama/Llama-2-7b-hf": _LLAMA}
_KNOWN_ROWS = {"hub:google/boolq:train": 9_427}
_ROW_TOKENS = 150
_BYTES_PER_TOKEN = 5.0
_ASSUMPTIONS = [
    "rows have 150 tokens, BoolQ's average (SmolLM2's tokenizer)",
    "an uploaded file has a token for every 5 bytes of JSON (BoolQ 4.6, SST-2 6.9)",
    "ReFT trains on cached keys and values; stages that arms share are trained once",
    "memory_bytes: weights in bfloat16 on the GPU, without activations; host_memory_bytes: the float32 copy of the"
    " weights that merges are checked with",
    "disk_bytes: the base model in bfloat16, and three copies of each job's adapters in float32",
]
_UNKNOWN = ["the sizes of the model or of the training file are not known"]

#: {training file: number of rows}
RowCounts = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class _Model:
    shape: Shape
    hidden_size: int
    parameters: int


def estimate_study(
    session: Session, *, owner_id: str, spec: StudySpec, reuse_enabled: bool = True
) -> dict[str, Any]:
    """Returns the estimate. Raises InvalidRequest as `studies.create`.

    The trials of a search are assumed to take as much as the first ones.
    """
    spec = spec.completed()
    assert spec.model is not None
    arms = plan(spec, base_model_info(session, spec.model))
    model, rows = _model(session, ids.base_of(spec.model)), _row_counts(session, owner_id, arms)
    estimates = {arm.name: _arm_estimate(arm, model, rows) for arm in arms}
    for arm in arms:
        if (reference := arm.equal_compute_to) is not None:
            flops = estimates[reference]["flops"]
            estimates[arm.name] |= {"flops": flops, "stages": [f"as much as {reference}"]}
    flops = None
    if model is not None and rows is not None:
        equal_arms = [estimates[arm.name]["flops"] for arm in arms if arm.equal_compute_to is not None]
        runs = [(arm, seed) for seed in spec.seeds for arm in arms if arm.equal_compute_to is None]
        flops = len(spec.seeds) * sum(equal_arms) + _flops_with_reuse(runs, model, rows, reuse_enabled)
    parameters = model.parameters if model is not None else 0
    adapters = sum(arm["trained_parameters"] or 0 for arm in estimates.values()) * len(spec.seeds)
    factor = _search_factor(spec, arms)
    return {
        "arms": list(estimates.values()),
        "jobs": round(factor * len(arms)) * len(spec.seeds),
        "flops": None if flops is None else factor * flops,
        "memory_bytes": 2 * parameters or None,
        "host_memory_bytes": 4 * parameters or None,
        "disk_bytes": 2 * parameters + round(3 * 4 * factor * adapters) if model is not None else None,
        "assumptions": _ASSUMPTIONS if flops is not None else _UNKNOWN,
    }


def _search_factor(spec: StudySpec, arms: Sequence[PlannedArm]) -> float:
    """Returns the number of all arms over that of the first ones, which alone are planned in a search."""
    if spec.search is None:
        return 1.0
    return (spec.search.budget + (spec.baseline is not None)) / len(arms)


def _arm_estimate(arm: PlannedArm, model: _Model | None, rows: RowCounts | None) -> dict[str, Any]:
    stages = arm.spec.stages()
    flops, trained = None, None
    if model is not None:
        trained = sum(_trained_parameters(stage, model) for stage in stages)
        if rows is not None:
            flops = sum(_flops(stage, model, rows[arm.spec.training_file]) for stage in stages)
    return {
        "name": arm.name,
        "stages": [f"{stage.type} × {stage.n_epochs}" for stage in stages],
        "flops": flops,
        "trained_parameters": trained,
    }


def _flops_with_reuse(
    runs: list[tuple[PlannedArm, int]], model: _Model, rows: RowCounts, reuse_enabled: bool
) -> float:
    """Returns the compute of all runs; first stages that several runs share count once if reuse is enabled."""
    seen: set[str] = set()
    total = 0.0
    for arm, seed in runs:
        spec = arm.with_seed(seed)
        keys = prefix_keys("", spec) if reuse_enabled else []
        for index, stage in enumerate(spec.stages()):
            if keys and keys[index] in seen:
                continue
            total += _flops(stage, model, rows[spec.training_file])
        seen.update(keys)
    return total


def _flops(stage: Stage, model: _Model, rows: int) -> float:
    row = RowTokens(total=_ROW_TOKENS, suffix=_ROW_TOKENS, supervised=1)
    if isinstance(stage, LoraStage):
        first = min(stage.layers) if stage.layers else 0
        work = StageWork(
            level=CacheLevel.NONE,
            first_layer=first,
            epochs=stage.n_epochs,
            adapter=_trained_parameters(stage, model),
        )
    else:
        row = RowTokens(total=_ROW_TOKENS, suffix=1, supervised=1)
        layer = min(_reft_layers(stage, model)) + 1
        work = StageWork(level=CacheLevel.KV, first_layer=layer, epochs=stage.n_epochs)
    return float(rows * stage_flops(model.shape, [row], work))


def _trained_parameters(stage: Stage, model: _Model) -> int:
    """Returns those of LoRA on query and value projections as wide as the model, or of LoReFT's R, W and b."""
    if isinstance(stage, LoraStage):
        layers = len(stage.layers) if stage.layers else model.shape.layers
        return layers * 2 * 2 * model.hidden_size * stage.rank
    return len(_reft_layers(stage, model)) * (2 * model.hidden_size + 1) * stage.rank


def _reft_layers(stage: ReftStage, model: _Model) -> list[int]:
    return stage.layers if isinstance(stage.layers, list) else [round(15 / 32 * model.shape.layers)]


def _model(session: Session, name: str) -> _Model | None:
    info: dict[str, Any] | None = _KNOWN_MODELS.get(name)
    with suppress(NotFound):
        info = dict(models.get(session, owner_id="", model_id=name).info) or info
    if info is None or not {"n_layers", "hidden_size", "parameters", "vocab_size"} <= info.keys():
        return None
    head = int(info["vocab_size"]) * int(info["hidden_size"])
    shape = Shape(
        layers=int(info["n_layers"]),
        layer=(int(info["parameters"]) - head) // int(info["n_layers"]),
        head=head,
        width=int(info["hidden_size"]),
    )
    return _Model(shape=shape, hidden_size=int(info["hidden_size"]), parameters=int(info["parameters"]))


def _row_counts(session: Session, owner_id: str, arms: Sequence[PlannedArm]) -> RowCounts | None:
    """Returns the number of rows of each training file; None if one is unknown."""
    counts: RowCounts = {}
    for reference in {arm.spec.training_file for arm in arms}:
        if reference.startswith("file-"):
            size = files.for_job(session, owner_id=owner_id, file_id=reference).bytes
            counts[reference] = max(1, round(size / _BYTES_PER_TOKEN / _ROW_TOKENS))
        elif reference in _KNOWN_ROWS:
            counts[reference] = _KNOWN_ROWS[reference]
        else:
            return None
    return counts
