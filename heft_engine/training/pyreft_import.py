"""A pyreft directory becomes a bundle: the base as it is (or as the user merged it), the interventions in place.

Opens pickles: for library users and the command line, never for the service. It does NOT know the file format.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from heft_engine.bundle.format import Bundle, StoredIntervention
from heft_engine.bundle.pyreft_format import read_pyreft
from heft_engine.config.train import ReftStage, TrainConfig
from heft_engine.data.rows import Row
from heft_engine.model.base_models import resolve
from heft_engine.runtime.devices import choose_device
from heft_engine.training.cache_plan import CacheBudget
from heft_engine.training.result import write_outcome
from heft_engine.training.run import prepare


def import_pyreft(
    directory: Path,
    config: TrainConfig,
    rows: Sequence[Row],
    out_dir: Path,
    *,
    positions: str | Sequence[str] | None = None,
    model_dir: Path | None = None,
    cache_dir: Path | None = None,
    allow_paths: bool = True,
    device: str | None = None,
) -> Bundle:
    """Writes a bundle that answers as pyreft's model did, given the prompts it was trained on (`config.task`).

    Of `config`, base model, task, length and dtype count; its stages are replaced by what the directory holds.
    `rows` are a few of the task with their answers, of which the probe rows are taken. `positions` as `read_pyreft`
    has it. Raises BundleError for a directory that can't be read, ConfigError when the base does not fit, RowError.
    """
    interventions = read_pyreft(directory, positions=positions)
    stages = reft_stages(interventions)
    base = resolve(config.model, model_dir=model_dir, cache_dir=cache_dir, allow_paths=allow_paths)
    config = config.model_copy(update={"stages": stages, "method": "recipe"})
    run = prepare(config, base, rows, (), (), device or choose_device(), lambda event: None, CacheBudget())
    run.lm.interventions.extend(stored.restore(run.lm.hidden_size) for stored in interventions)
    run.state.stage_index = len(stages)
    return write_outcome(run, out_dir)


def reft_stages(interventions: Sequence[StoredIntervention]) -> list[ReftStage]:
    """The stages that would have left these interventions: one for each run of equal rank, positions and kind."""
    runs: list[list[StoredIntervention]] = []
    for intervention in interventions:
        last = runs[-1] if runs else []
        joins = last and (last[0].rank, last[0].positions, last[0].kind) == (
            intervention.rank,
            intervention.positions,
            intervention.kind,
        )
        if joins and intervention.layer not in [other.layer for other in last]:
            last.append(intervention)
        else:
            runs.append([intervention])
    return [
        ReftStage(
            layers=sorted(s.layer for s in run),
            rank=run[0].rank,
            positions=run[0].positions,
            kind=run[0].kind,
        )
        for run in runs
    ]
