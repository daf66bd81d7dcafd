"""What a run trains: its model, encoder and examples, from a config, a base and rows. Nothing is trained here.

It does NOT know files, events or stages beyond their settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heft_engine.adapters.lora import peft_layers as lora
from heft_engine.config.train import LoraStage, TrainConfig
from heft_engine.data.encoding import Encoder, Example
from heft_engine.data.rows import Row, infer_task
from heft_engine.data.task import Task
from heft_engine.errors import ConfigError, RowError
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.auto_settings import resolve_max_length, resolve_stage
from heft_engine.model.base_models import BaseModel, load_model, load_tokenizer
from heft_engine.model.model_files import inspect
from heft_engine.model.packed_lm import PackedLM
from heft_engine.objectives.registry import create
from heft_engine.runtime.devices import choose_dtype

#: The rows that probe rows are chosen from.
PROBE_CANDIDATES = 64


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """By the names of `heft_engine.training.run.Run`."""

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


def load(
    config: TrainConfig,
    base: BaseModel,
    train_rows: Sequence[Row],
    eval_rows: Sequence[Row],
    test_rows: Sequence[Row],
    device: str,
) -> Loaded:
    """Resolves a config against its base and rows. Raises RowError, ConfigError and ModelError."""
    if not train_rows:
        raise RowError("there are no training rows", param="training_file")
    if config.early_stopping is not None and not eval_rows:
        raise ConfigError("early stopping needs validation rows to watch", param="early_stopping")
    model_info = inspect(base.path)
    tokenizer = load_tokenizer(base.path)
    task = Task.resolve(config.task, infer_task(train_rows))
    max_length = resolve_max_length(config.max_length, model_info.max_position_embeddings)
    encoder = Encoder(tokenizer, task, max_length)
    lm = PackedLM(
        load_model(base, dtype=choose_dtype(config.dtype, device), device=device, attention=IMPLEMENTATION)
    )
    reported = test_rows or eval_rows
    objective = create(config.stages[0].objective)
    return Loaded(
        config=_resolved(config, lm, model_info.parameters),
        base=base,
        lm=lm,
        encoder=encoder,
        examples=objective.examples(encoder, train_rows),
        validation=objective.examples(encoder, eval_rows),
        questions=[example for row in eval_rows for example in encoder.encode(row)],
        reported=[example for row in reported for example in encoder.encode(row)],
        split="test" if test_rows else "validation",
        probe_row_source=list((eval_rows or train_rows)[:PROBE_CANDIDATES]),
    )


def _resolved(config: TrainConfig, lm: PackedLM, parameters: int) -> TrainConfig:
    """With stages that fit this model."""
    sizes = {"n_layers": lm.n_layers, "hidden_size": lm.hidden_size, "parameters": parameters}
    stages = [resolve_stage(stage, lm.family, **sizes) for stage in config.stages]
    for stage in stages:
        if isinstance(stage, LoraStage) and stage.target_modules != "auto":
            lora.check_modules(lm, stage.target_modules)
    return config.model_copy(update={"stages": stages})
