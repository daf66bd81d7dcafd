"""A run's inputs: its model, encoder and examples, made from a config, a base and rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heft_engine.adapters.parity import PROBE_ROWS
from heft_engine.adapters.registry import check_stage
from heft_engine.bundle.start import StartModel
from heft_engine.config.train import TrainConfig
from heft_engine.data.encoding import Encoder, Example
from heft_engine.data.general_text import general_examples
from heft_engine.data.rows import Row, infer_task
from heft_engine.data.task import Task
from heft_engine.errors import ConfigError, RowError
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.auto_settings import resolve_max_length, resolve_stage
from heft_engine.model.base_models import BaseModel, load_model, load_tokenizer
from heft_engine.model.model_files import inspect
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.precision import dtype_for
from heft_engine.objectives.registry import create
from heft_engine.runtime.distributed import SINGLE_PROCESS, Ranks

#: Probe rows are the shortest of this many rows.
_PROBE_CANDIDATES = 64


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """Everything that a run trains and measures. Its model changes with every stage, nothing else does."""

    config: TrainConfig  #: stages resolved, nothing left on "auto"
    base: BaseModel
    lm: PackedLM
    encoder: Encoder
    examples: list[Example]  #: training rows, as the objective encodes them
    validation: list[Example]  #: validation rows, as the objective encodes them
    questions: list[Example]  #: validation rows with every label as an answer
    reported: list[Example]  #: rows of `split` with every label as an answer: the evaluation's
    split: str  #: "test", or "validation" where there are no test rows
    merge_probes: list[Example]  #: training rows on which a merged model is compared with the adapter
    bundle_probes: list[tuple[Row, Example]]  #: rows on which a loaded bundle is compared with training
    general: list[Example]  #: text that has nothing to do with the task, to measure forgetting on
    start: StartModel | None = None  #: the fine-tuned model that the run goes on from; None: the base
    ranks: Ranks = SINGLE_PROCESS  #: the processes of this run

    @property
    def stages_before(self) -> int:
        """The number of stages of the model that the run goes on from."""
        return len(self.start.info.stages) if self.start is not None else 0

    def first_step(self, index: int) -> int:
        """Returns the number of optimizer steps before stage `index`."""
        stages = self.config.stages[:index]
        return sum(stage.n_epochs * -(-len(self.examples) // stage.batch_size) for stage in stages)

    @property
    def total_steps(self) -> int:
        return self.first_step(len(self.config.stages))


def load(
    config: TrainConfig,
    base: BaseModel,
    train_rows: Sequence[Row],
    eval_rows: Sequence[Row],
    test_rows: Sequence[Row],
    device: str,
    ranks: Ranks = SINGLE_PROCESS,
    start: StartModel | None = None,
) -> RunInputs:
    """Loads the base and encodes the rows. Raises RowError, ConfigError and ModelError.

    start: its settings are inherited already, its stages are not yet in place. Raises BundleError for a start that was
    trained with another tokenizer.
    """
    if not train_rows:
        raise RowError("there are no training rows", param="training_file")
    if config.early_stopping is not None and not eval_rows:
        raise ConfigError("early stopping needs validation rows", param="early_stopping")
    model_info = inspect(base.path)
    tokenizer = load_tokenizer(base.path)
    if start is not None:
        start.check_tokenizer(tokenizer)
    start_task = start.task if start is not None else None
    task = Task.resolve(config.task, infer_task(train_rows), start_task)
    if config.early_stopping is not None and (reason := config.early_stopping.task_error(task.type)):
        raise ConfigError(reason, param="early_stopping.metric")
    max_length = resolve_max_length(config.max_length, model_info.max_position_embeddings)
    encoder = Encoder(tokenizer, task, max_length, vocab_size=model_info.vocab_size)
    dtype = dtype_for(base, config.dtype, device)
    quantization = config.base_quantization
    model = load_model(base, dtype=dtype, device=device, attention=IMPLEMENTATION, quantization=quantization)
    lm = PackedLM(model)
    objective = create(config.stages[0].objective)
    examples = objective.examples(encoder, train_rows)
    probe_rows = (eval_rows or train_rows)[:_PROBE_CANDIDATES]
    probes = [(row, example) for row in probe_rows for example in encoder.encode(row)]
    return RunInputs(
        config=_resolved(config, lm, model_info.parameters),
        base=base,
        lm=lm,
        encoder=encoder,
        examples=examples,
        validation=objective.examples(encoder, eval_rows),
        questions=_questions(encoder, eval_rows),
        reported=_questions(encoder, test_rows or eval_rows),
        split="test" if test_rows else "validation",
        merge_probes=sorted(examples[:_PROBE_CANDIDATES], key=_prompt_length)[:PROBE_ROWS],
        bundle_probes=sorted(probes, key=lambda probe: _prompt_length(probe[1]))[:PROBE_ROWS],
        general=[example.supervised() for example in general_examples(encoder)],
        start=start,
        ranks=ranks,
    )


def _resolved(config: TrainConfig, lm: PackedLM, parameters: int) -> TrainConfig:
    """Returns the config with stages that fit this model."""
    sizes = {"n_layers": lm.n_layers, "hidden_size": lm.hidden_size, "parameters": parameters}
    stages = [resolve_stage(stage, lm.family, **sizes) for stage in config.stages]
    for stage in stages:
        check_stage(lm, stage)
    return config.model_copy(update={"stages": stages})


def _questions(encoder: Encoder, rows: Sequence[Row]) -> list[Example]:
    return [example for row in rows for example in encoder.encode(row)]


def _prompt_length(example: Example) -> int:
    return len(example.prompt)
