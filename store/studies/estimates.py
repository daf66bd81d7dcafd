"""What a study would take, before any of it is run: arithmetic, memory and disk, roughly, with what was assumed.

Arithmetic is heft_engine.config.flops's, on assumed rows. It does NOT read files or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from heft_engine.config.flops import CacheLevel, RowTokens, Shape, StageWork, stage_flops
from heft_engine.config.train import LoraStage, ReftStage, Stage
from store import models
from store.errors import NotFound
from store.jobs.shared_prefix import prefix_keys
from store.storage import files
from store.studies.arms import PlannedArm
from store.studies.plan import plan
from store.studies.spec import StudySpec
from store.studies.studies import base_model_info

#: Llama-2-7B and BoolQ's training rows: the paper's own run can be estimated where no worker has seen them.
_LLAMA = {"n_layers": 32, "hidden_size": 4_096, "parameters": 6_738_415_616, "vocab_size": 32_000}
_KNOWN_MODELS = {"meta-llama/Llama-2-7b-hf": _LLAMA}
_KNOWN_ROWS = {"hub:google/boolq:train": 9_427}
_ROW_TOKENS = 150
_BYTES_A_TOKEN = 5.0
_ASSUMED = (
    "rows of 150 tokens, as BoolQ's are on average (SmolLM2's tokenizer)",
    "an uploaded file holds one token for 5 bytes of JSON (BoolQ 4.6, SST-2 6.9)",
    "ReFT on cached keys and values; stages that arms share are trained once",
    "memory_bytes: weights in bfloat16 on the GPU, activations come on top; host_memory_bytes: the float32 copy that"
    " merges are checked with",
    "disk_bytes: the base model in bfloat16, and adapters in float32, three times for each job",
)


#: Of each training file.
Rows = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class _Model:
    shape: Shape
    hidden: int
    parameters: int


def estimate_study(
    session: Session, *, owner_id: str, spec: StudySpec, reuse_enabled: bool = True
) -> dict[str, Any]:
    """Raises InvalidRequest as `studies.create` does. Of a search, as if its trials were like the first ones."""
    spec = spec.completed()
    assert spec.model is not None
    arms = plan(spec, base_model_info(session, spec.model))
    model, rows = _model(session, spec.model), _rows(session, owner_id, arms)
    shown = [_of_arm(arm, model, rows) for arm in arms]
    by_name = {one["name"]: one for one in shown}
    for arm in arms:
        if arm.like is not None:
            by_name[arm.name] |= {"flops": by_name[arm.like]["flops"], "stages": [f"as much as {arm.like}"]}
    flops = None
    if model is not None and rows is not None:
        likened = len(spec.seeds) * sum(by_name[arm.name]["flops"] for arm in arms if arm.like)
        chosen = [(arm, seed) for seed in spec.seeds for arm in arms if arm.like is None]
        flops = likened + _with_reuse(chosen, model, rows, reuse_enabled)
    weights = model.parameters if model is not None else 0
    adapters = sum(one["trained_parameters"] or 0 for one in shown) * len(spec.seeds)
    more = _more_trials(spec, arms)
    return {
        "arms": shown,
        "jobs": round(more * len(arms)) * len(spec.seeds),
        "flops": None if flops is None else more * flops,
        "memory_bytes": 2 * weights or None,
        "host_memory_bytes": 4 * weights or None,
        "disk_bytes": 2 * weights + round(3 * 4 * more * adapters) if model is not None else None,
        "assumptions": [*_ASSUMED]
        if flops is not None
        else ["the sizes of the model or of the training file are not known"],
    }


def _more_trials(spec: StudySpec, arms: Sequence[PlannedArm]) -> float:
    """How many times the arms that a study begins with there will be: of a search only the first are known."""
    if spec.search is None:
        return 1.0
    besides = spec.baseline is not None
    return (spec.search.budget + besides) / len(arms)


def _of_arm(arm: PlannedArm, model: _Model | None, rows: Rows | None) -> dict[str, Any]:
    stages = arm.spec.stages()
    flops = None
    if model is not None and rows is not None:
        flops = sum(_flops(stage, model, rows[arm.spec.training_file]) for stage in stages)
    return {
        "name": arm.name,
        "stages": [f"{stage.type} × {stage.n_epochs}" for stage in stages],
        "flops": flops,
        "trained_parameters": sum(_trained(stage, model) for stage in stages) if model is not None else None,
    }


def _with_reuse(runs: list[tuple[PlannedArm, int]], model: _Model, rows: Rows, reuse_enabled: bool) -> float:
    """Stages that begin several jobs alike are counted once, where the operator keeps them."""
    seen: set[str] = set()
    total = 0.0
    for arm, seed in runs:
        spec = arm.with_seed(seed)
        keys: Sequence[str | None] = prefix_keys("", spec) if reuse_enabled else []
        for stage, key in zip(spec.stages(), keys or [None] * len(spec.stages()), strict=True):
            if key is None or key not in seen:
                total += _flops(stage, model, rows[spec.training_file])
            seen |= {key} if key is not None else set()
    return total


def _flops(stage: Stage, model: _Model, rows: int) -> float:
    row = RowTokens(total=_ROW_TOKENS, suffix=_ROW_TOKENS, supervised=1)
    if isinstance(stage, LoraStage):
        first = min(stage.layers) if stage.layers else 0
        work = StageWork(
            level=CacheLevel.NONE, first_layer=first, epochs=stage.n_epochs, adapter=_trained(stage, model)
        )
    else:
        row = RowTokens(total=_ROW_TOKENS, suffix=1, supervised=1)
        layer = min(_reft_layers(stage, model)) + 1
        work = StageWork(level=CacheLevel.KV, first_layer=layer, epochs=stage.n_epochs)
    return float(rows * stage_flops(model.shape, [row], work))


def _trained(stage: Stage, model: _Model) -> int:
    """LoRA on query and value projections, both as wide as the model; LoReFT's R, W and b."""
    if isinstance(stage, LoraStage):
        layers = len(stage.layers) if stage.layers else model.shape.layers
        return layers * 2 * 2 * model.hidden * stage.rank
    return len(_reft_layers(stage, model)) * (2 * model.hidden + 1) * stage.rank


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
    return _Model(shape=shape, hidden=int(info["hidden_size"]), parameters=int(info["parameters"]))


def _rows(session: Session, owner_id: str, arms: Sequence[PlannedArm]) -> Rows | None:
    """How many rows each training file has; None where that isn't known of all."""
    found = {arm.spec.training_file: 0 for arm in arms}
    for reference in found:
        if reference.startswith("file-"):
            size = files.for_job(session, owner_id=owner_id, file_id=reference).bytes
            found[reference] = max(1, round(size / _BYTES_A_TOKEN / _ROW_TOKENS))
        elif reference in _KNOWN_ROWS:
            found[reference] = _KNOWN_ROWS[reference]
        else:
            return None
    return found
