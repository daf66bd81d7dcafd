"""Is the merged model the adapter that was trained? Measured on probe rows at every merge.

Three figures, each the largest absolute difference of the logits at supervised tokens:
    float32         adapter beside merged, both in float32 on the CPU: must stay below LIMIT, or the run fails
    served_dtype    adapter beside merged in the dtype that is served
    dtype_noise     the merged model in the served dtype beside itself in float32: what that dtype costs anyway
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from heft_engine.adapters.lora import peft_layers as lora
from heft_engine.adapters.lora.intruders import repaired
from heft_engine.adapters.lora.peft_layers import LoraWeights
from heft_engine.config.train import LoraStage
from heft_engine.data.encoding import Example
from heft_engine.errors import TrainingError
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import micro_batches, pack

LIMIT = 1e-3
#: Probe rows are a few short ones, because they also run in float32 on the CPU.
PROBE_ROWS = 8
#: Tokens of one pass over probe rows: beside the model's float32 copy, memory is short.
TOKEN_BUDGET = 2_048


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The record of one merge; `limit` is what `float32` was held to."""

    float32: float
    served_dtype: float
    dtype_noise: float
    dtype: str
    limit: float
    rows: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def probe_logits(lm: PackedLM, examples: Sequence[Example]) -> Tensor:
    """Float32 logits at the supervised tokens of probe rows, without interventions: (tokens, vocabulary), CPU."""
    with lm.interventions.disabled():
        parts = [_logits(lm, part) for part in micro_batches(examples, TOKEN_BUDGET)]
    return torch.cat(parts)


def _logits(lm: PackedLM, examples: Sequence[Example]) -> Tensor:
    batch = pack(examples)
    hidden = lm.hidden(batch)
    return lm.logits(hidden[batch.supervised()[0]]).float().cpu()


def merge_and_verify(
    lm: PackedLM, adapted: Any, stage: LoraStage, adapter: LoraWeights, examples: Sequence[Example]
) -> Parity:
    """Detaches the trained adapter, merges it, and compares. Raises TrainingError (parity_broken) above LIMIT."""
    with_adapter = probe_logits(lm, examples)
    raw = {name: tensor.detach().clone() for name, tensor in lora.trainable(adapted).items()}
    begun = {name: tensor.clone() for name, tensor in lora.initial(adapted).items()}
    lora.detach(adapted)
    exact = float32_copy(lm)
    exact_with_adapter = _as_peft_has_it(exact, stage, adapter.target_modules, raw, begun, examples)
    _restore(exact, lm, adapter)
    lora.merge(lm.model, adapter)
    merged = probe_logits(lm, examples)
    lora.merge(exact.model, adapter)
    exact_merged = probe_logits(exact, examples)

    parity = Parity(
        float32=_difference(exact_with_adapter, exact_merged),
        served_dtype=_difference(with_adapter, merged),
        dtype_noise=_difference(merged, exact_merged),
        dtype=str(lm.dtype).removeprefix("torch."),
        limit=LIMIT,
        rows=len(examples),
    )
    if not parity.float32 <= LIMIT:
        message = (
            f"the merged model is not the adapter that was trained: their float32 logits differ by "
            f"{parity.float32:.2g}, allowed is {LIMIT:g}"
        )
        raise TrainingError(message, code="parity_broken")
    return parity


def merge_stage(
    lm: PackedLM, adapted: Any, stage: LoraStage, adapter: LoraWeights, examples: Sequence[Example]
) -> tuple[LoraWeights, dict[str, Any]]:
    """Merges what a stage has trained, its intruder dimensions scaled if the stage says so (after the comparison, which
    is of what was trained). Returns what was merged, and the record. Raises TrainingError (parity_broken).
    """
    scale = stage.merge.intruder_scale
    if scale is None:
        return adapter, merge_and_verify(lm, adapted, stage, adapter, examples).to_json()
    with torch.no_grad():
        found = {module: lora.weight_of(lm.model, module).clone() for module in adapter.factors}
    parity = merge_and_verify(lm, adapted, stage, adapter, examples)
    adapter, count = repaired(adapter, found.__getitem__, scale)
    with torch.no_grad():
        for module, weight in found.items():
            lora.weight_of(lm.model, module).copy_(weight)
    lora.merge(lm.model, adapter)
    return adapter, {**parity.to_json(), "intruder_scale": scale, "intruders": count}


def _as_peft_has_it(
    exact: PackedLM,
    stage: LoraStage,
    modules: list[str],
    raw: dict[str, Tensor],
    begun: dict[str, Tensor],
    examples: Sequence[Example],
) -> Tensor:
    """The probe rows' logits by the raw parameters and peft's own forward pass, none of this engine's conversions.

    PiSSA and OLoRA: on W − s·B₀A₀, which is left behind in `exact`.
    """
    shadow = lora.attach(exact, stage.model_copy(update={"init": "default"}), modules)
    shadow.eval()  # peft makes an adapter with its dropout on
    with torch.no_grad():
        for name, parameter in lora.trainable(shadow).items():
            parameter.copy_(raw[name])
        for name, down in begun.items():
            module = name.removesuffix(".lora_A")
            if module != name:
                layer = cast(Any, exact.model.get_submodule(module)).base_layer
                layer.weight.sub_((stage.scaling * begun[f"{module}.lora_B"] @ down).to(layer.weight.device))
    logits = probe_logits(exact, examples)
    lora.detach(shadow)
    return logits


@torch.no_grad()
def _restore(exact: PackedLM, lm: PackedLM, adapter: LoraWeights) -> None:
    for module in adapter.factors:
        lora.weight_of(exact.model, module).copy_(lora.weight_of(lm.model, module))


def float32_copy(lm: PackedLM) -> PackedLM:
    """The same model in float32 on the CPU, without interventions; the original stays where it is."""
    model = cast(Any, lm.model)
    with no_init_weights():
        copy: nn.Module = type(model)._from_config(
            model.config, dtype=torch.float32, attn_implementation=model.config._attn_implementation
        )
    source = model.state_dict()
    with torch.no_grad():
        # Tensor by tensor: a second float32 model would not fit beside the first of 7 billion parameters.
        for name, tensor in copy.state_dict().items():
            tensor.copy_(source[name])
    copy.requires_grad_(False)
    return PackedLM(copy.eval())


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
