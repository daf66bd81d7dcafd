"""The plan of a run that has not begun, from a model's configuration alone: memory, cache and arithmetic of each stage.

The planner of a real stage (heft_engine.training.plan) plans a model on torch's "meta" device, whose tensors have
shapes and no numbers, for a GPU that need not be there. So a stage is refused here where a GPU of that size would
refuse it. Not counted: evaluation, and the time that a GPU waits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import transformers

from heft_engine.adapters.lora.adapter import LoraAdapter
from heft_engine.adapters.lora.weights import linear_of
from heft_engine.adapters.registry import attach, check_stage
from heft_engine.bundle.assemble import restore_interventions
from heft_engine.bundle.format import Bundle
from heft_engine.config.train import Stage, TrainConfig
from heft_engine.data.encoding import Example
from heft_engine.errors import TrainingError
from heft_engine.model import nf4
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.auto_settings import resolve_max_length, resolve_stage
from heft_engine.model.families import family_of
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import packed_length
from heft_engine.runtime.devices import dtype_of, reserved_share
from heft_engine.training.costs import stage_cost
from heft_engine.training.memory.cache_plan import CacheBudget
from heft_engine.training.plan import StagePlan, plan_stage
from heft_engine.training.progress import Progress
from heft_engine.training.stage_inputs import StageInputs, StageOptions

#: Bytes of a GPU that CUDA takes for itself before a tensor is there. An assumption: between 0.3 and 0.6 GB.
CONTEXT_BYTES = 500_000_000
#: Of the machine's free memory a run takes so much for caches (heft_engine.training.memory.cache_plan).
_CACHE_SHARE = 4


#: How a run may use several GPUs, the best first.
Placement = Literal["data parallel", "spread"]
_PLACEMENTS: tuple[Placement, ...] = ("data parallel", "spread")
#: The placement by the number of GPUs where there is no choice.
_NAMES = {0: "CPU", 1: "one GPU"}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """GPUs of gpu_bytes each, and host_bytes of the machine's memory that are free. Without GPUs it trains in these.

    stage_bytes: what a stage may take beside the model; None: all that is free. cache_memory_bytes: what its cache may
    take of the machine's memory; None: a quarter. auto_dtype: the dtype that it chooses for a model.
    """

    gpu_bytes: int
    gpus: int
    host_bytes: int
    stage_bytes: int | None = None
    cache_memory_bytes: int | None = None
    auto_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    @property
    def room(self) -> int:
        """Bytes of one GPU, or of a machine without one, that a model and its training may take."""
        if not self.gpus:
            return self.host_bytes
        return self.gpu_bytes - CONTEXT_BYTES - reserved_share(self.gpu_bytes)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The training rows: their number, their mean length and the longest one's, in tokens with the answer."""

    count: int
    tokens: int
    longest: int

    def within(self, max_length: int) -> Rows:
        """Returns the rows as training truncates them."""
        return replace(self, tokens=min(self.tokens, max_length), longest=min(self.longest, max_length))

    def examples(self) -> list[Example]:
        """Returns rows of these lengths: one is the longest, all others have the mean length."""

        def row(tokens: int) -> Example:
            return Example(prompt=(1,) * (tokens - 1), answers=((1,),), labels=("",), gold=0)

        return [row(self.longest)] + [row(self.tokens)] * (self.count - 1)


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """One stage on this machine. Bytes are those of each GPU, but for host_bytes, and for weight_bytes without a GPU.

    placement: "CPU", "one GPU", "data parallel" (the model on each), or "spread" (`--device auto`: the layers over all,
    evenly it is assumed; passes are planned for the first GPU, as a stage plans them).
    steps: optimizer steps; early stopping may end before.
    error: of a stage that does not fit, with what would. seconds: None without a rate of arithmetic.
    """

    type: str
    fits: bool
    placement: str
    weight_bytes: int
    gpu_bytes: int | None = None
    host_bytes: int | None = None
    cache: dict[str, Any] | None = None
    token_budget: int | None = None
    checkpointing: bool | None = None
    trained_parameters: int | None = None
    steps: int | None = None
    flops: int | None = None
    seconds: float | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def plan_run(
    config: TrainConfig,
    model_config: transformers.PreTrainedConfig,
    rows: Rows,
    machine: Machine,
    *,
    start: Bundle | None = None,
    flops_per_second: float | None = None,
) -> list[PlannedStage]:
    """Returns the plan of each stage, in order, in the first placement that all stages fit.

    start: the fine-tuned model that the run goes on from. flops_per_second: of one GPU.

    Raises ConfigError for settings that do not fit the model.
    """
    limit = getattr(model_config, "max_position_embeddings", None)
    examples = rows.within(resolve_max_length(config.max_length, limit)).examples()
    plans = (
        list(
            _planned(
                meta_model(model_config, config, machine.auto_dtype),
                config,
                start,
                examples,
                machine,
                placement,
                flops_per_second,
            )
        )
        for placement in _PLACEMENTS[: 1 if machine.gpus <= 1 else 2]
    )
    first = next(plans)
    if all(stage.fits for stage in first):
        return first
    return next((plan for plan in plans if all(stage.fits for stage in plan)), first)


def meta_model(
    model_config: transformers.PreTrainedConfig, config: TrainConfig, auto_dtype: str = "bfloat16"
) -> PackedLM:
    """Returns a model without numbers. auto_dtype: bfloat16 on GPUs of compute capability 8.0 and more."""
    if auto_dtype == "float16" and not family_of(model_config).fits_float16:
        auto_dtype = "float32"
    dtype = dtype_of(auto_dtype if config.dtype == "auto" else config.dtype)
    model_config._attn_implementation = IMPLEMENTATION
    model_class: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]
    with torch.device("meta"):
        model = model_class._from_config(model_config, dtype=dtype, attn_implementation=IMPLEMENTATION)
    lm = PackedLM(model.requires_grad_(False).eval())
    if config.base_quantization is not None:
        nf4.quantize_without_numbers(lm.layers)
    return lm


def _planned(
    lm: PackedLM,
    config: TrainConfig,
    start: Bundle | None,
    examples: list[Example],
    machine: Machine,
    placement: Placement,
    flops_per_second: float | None,
) -> Iterator[PlannedStage]:
    stages = _resolved(lm, config)
    if start is not None:
        _put_in_place(lm, start)
    for index, stage in enumerate(stages):
        standing = tuple(lm.interventions)
        inputs = StageInputs(
            lm=lm,
            stage=stage,
            index=index,
            seed=0,
            adapter=attach(lm, stage),
            standing=standing,
            examples=examples,
            validation=[],
            total_steps=0,
        )
        yield _planned_stage(inputs, machine, placement, flops_per_second)
        if isinstance(inputs.adapter, LoraAdapter):
            _merge(inputs.adapter)


def _resolved(lm: PackedLM, config: TrainConfig) -> list[Stage]:
    sizes = {"n_layers": lm.n_layers, "hidden_size": lm.hidden_size, "parameters": lm.parameters}
    stages = [resolve_stage(stage, lm.family, **sizes) for stage in config.stages]
    for stage in stages:
        check_stage(lm, stage)
    return stages


def _put_in_place(lm: PackedLM, bundle: Bundle) -> None:
    """Leaves the model as a bundle's stages do, without numbers."""
    for adapter in bundle.adapters:
        for module in adapter.factors:
            linear = linear_of(lm.model, module)
            nf4.set_weight(linear, torch.empty_like(linear.weight))
    for placed in restore_interventions(bundle.interventions, lm):
        placed.intervention.to(lm.device)
        lm.interventions.add(placed)


def _merge(adapter: LoraAdapter) -> None:
    """Leaves the model as a merge does: with weights that are no longer in 4 bits where they were."""
    layers = adapter.layers()
    adapter.detach()
    for layer in layers:
        nf4.set_weight(layer, torch.empty_like(layer.weight))


def _planned_stage(
    inputs: StageInputs, machine: Machine, placement: Placement, flops_per_second: float | None
) -> PlannedStage:
    cards = machine.gpus if placement == "spread" else 1
    weights = _weight_bytes(inputs.lm) // cards
    planned = PlannedStage(
        type=inputs.stage.type,
        fits=False,
        placement=_NAMES.get(machine.gpus, placement),
        weight_bytes=weights,
        trained_parameters=inputs.trained_parameters(),
        steps=inputs.stage.n_epochs * math.ceil(len(inputs.examples) / inputs.stage.batch_size),
    )
    room = machine.room - weights
    if room <= 0:
        device = "a GPU" if machine.gpus else "the machine"
        message = (
            f"the weights alone take {weights / 1e9:.1f} GB, and {device} has {machine.room / 1e9:.1f} GB for them; "
            f"take a smaller model, base_quantization=nf4 or {device} with more memory"
        )
        return replace(planned, error=message)
    cache_bytes = machine.cache_memory_bytes
    options = StageOptions(
        cache=CacheBudget(memory=machine.host_bytes // _CACHE_SHARE if cache_bytes is None else cache_bytes),
        compile=False,
        memory_bytes=room if machine.stage_bytes is None else min(room, machine.stage_bytes),
    )
    try:
        with plan_stage(inputs, options) as plan:
            return _fitting(planned, inputs, plan, machine, flops_per_second)
    except TrainingError as error:
        return replace(planned, error=str(error))


def _fitting(
    planned: PlannedStage,
    inputs: StageInputs,
    plan: StagePlan,
    machine: Machine,
    flops_per_second: float | None,
) -> PlannedStage:
    epochs, tokens = inputs.stage.n_epochs, sum(map(packed_length, inputs.examples))
    progress = Progress(tokens=epochs * tokens, cache=plan.cache.to_json(), checkpointing=plan.checkpointing)
    flops = stage_cost(inputs, progress, 0.0)["flops"]
    # GPUs that share a model's layers work one after the other.
    workers = machine.gpus if planned.placement == "data parallel" else 1
    device_bytes = planned.weight_bytes + plan.memory_bytes
    return replace(
        planned,
        fits=True,
        gpu_bytes=device_bytes if machine.gpus else None,
        host_bytes=plan.host_memory_bytes + (0 if machine.gpus else device_bytes),
        cache={"level": plan.cache.level.value, "place": plan.cache.place.value, "bytes": plan.cache.bytes},
        token_budget=plan.token_budget,
        checkpointing=plan.checkpointing,
        flops=flops,
        seconds=None if flops_per_second is None else round(flops / (flops_per_second * workers), 1),
    )


def _weight_bytes(lm: PackedLM) -> int:
    tensors = [*lm.model.parameters(), *lm.model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if not tensor.requires_grad)
