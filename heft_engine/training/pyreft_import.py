"""Import of a directory that pyreft saved as a bundle: the base as it is, the interventions in place.

It unpickles: for library users and the command line, never for the service.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from heft_engine.bundle.format import Bundle, StoredIntervention
from heft_engine.bundle.pyreft_format import read_pyreft
from heft_engine.config.run_file import RunOptions
from heft_engine.config.train import ReftStage, TrainConfig
from heft_engine.data.rows import Row
from heft_engine.model.base_models import resolve
from heft_engine.runtime.devices import choose_device
from heft_engine.training.checkpoint import RunState, rows_hash
from heft_engine.training.result import measure_stage, write_result
from heft_engine.training.setup import load


def import_pyreft(
    directory: Path,
    config: TrainConfig,
    rows: Sequence[Row],
    out_dir: Path,
    *,
    positions: str | Sequence[str] | None = None,
    options: RunOptions | None = None,
) -> Bundle:
    """Writes a bundle that answers as pyreft's model did, given the prompts it was trained on (`config.task`).

    `config`: base model, task, length and dtype; its stages are replaced by the directory's. `rows`: a few of the task
    with their answers, for the probe rows. `positions`: see `read_pyreft`. `options`: where models are, and the device.
    Raises BundleError for a directory that can't be read, ConfigError when the base does not fit, RowError.
    """
    options = options or RunOptions()
    stored = read_pyreft(directory, positions=positions)
    stages = reft_stages(stored)
    base = resolve(
        config.model,
        model_dir=options.model_dir,
        cache_dir=options.cache_dir,
        allow_paths=options.allow_paths,
    )
    config = config.model_copy(update={"stages": stages, "method": "recipe"})
    inputs = load(config, base, rows, (), (), options.device or choose_device())
    interventions = [intervention.restore(inputs.lm.hidden_size) for intervention in stored]
    inputs.lm.interventions.extend(interventions)
    state = RunState(rows_sha256=rows_hash(inputs.examples), stage_index=len(stages))
    return write_result(inputs, state, measure_stage(inputs), interventions, out_dir)


def reft_stages(interventions: Sequence[StoredIntervention]) -> list[ReftStage]:
    """Returns stages that would leave these interventions: neighbours of the same rank, positions and kind are one."""
    groups: list[list[StoredIntervention]] = []
    for intervention in interventions:
        group = groups[-1] if groups else []
        layers = [member.layer for member in group]
        if group and _shape(group[0]) == _shape(intervention) and intervention.layer not in layers:
            group.append(intervention)
        else:
            groups.append([intervention])
    return [
        ReftStage(
            layers=sorted(member.layer for member in group),
            rank=group[0].rank,
            positions=group[0].positions,
            kind=group[0].kind,
        )
        for group in groups
    ]


def _shape(intervention: StoredIntervention) -> tuple[int, str, str]:
    return intervention.rank, intervention.positions, intervention.kind
