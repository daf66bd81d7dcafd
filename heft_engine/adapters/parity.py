"""The check of a merge: the merged model must be the model that was trained, measured on probe rows.

Each figure is the largest absolute difference of the logits at supervised tokens:

    float32         adapter and merged, both in float32 on the CPU: above LIMIT the run fails
    served_dtype    adapter and merged in the dtype that is served
    dtype_noise     the merged model in the served dtype and in float32: the error of that dtype alone
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

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
    """The record of one merge; `limit` is the bound on `float32`."""

    float32: float
    served_dtype: float
    dtype_noise: float
    dtype: str
    limit: float
    rows: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ProbeLogits:
    """Logits of the probe rows, (tokens, vocabulary): in the dtype that is served, and in float32."""

    served: Tensor
    float32: Tensor


def compare(adapted: ProbeLogits, merged: ProbeLogits, dtype: torch.dtype, rows: int) -> Parity:
    """Returns the record of a merge. Raises TrainingError (parity_broken) above LIMIT."""
    parity = Parity(
        float32=_difference(adapted.float32, merged.float32),
        served_dtype=_difference(adapted.served, merged.served),
        dtype_noise=_difference(merged.served, merged.float32),
        dtype=str(dtype).removeprefix("torch."),
        limit=LIMIT,
        rows=rows,
    )
    if not parity.float32 <= LIMIT:
        message = (
            f"the merged model is not the adapter that was trained: their float32 logits differ by "
            f"{parity.float32:.2g}, allowed is {LIMIT:g}"
        )
        raise TrainingError(message, code="parity_broken")
    return parity


@torch.inference_mode()
def probe_logits(lm: PackedLM, examples: Sequence[Example]) -> Tensor:
    """Returns float32 logits at the supervised tokens of probe rows, interventions disabled: (tokens, vocabulary)."""
    with lm.interventions.disabled():
        parts = [_logits(lm, part) for part in micro_batches(examples, TOKEN_BUDGET)]
    return torch.cat(parts)


def _logits(lm: PackedLM, examples: Sequence[Example]) -> Tensor:
    batch = pack(examples)
    hidden = lm.hidden(batch)
    return lm.logits(hidden[batch.supervised()[0]]).float().cpu()


def float32_copy(lm: PackedLM) -> PackedLM:
    """Returns the same model in float32 on the CPU, without interventions; the original stays where it is."""
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
