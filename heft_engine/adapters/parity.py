"""The check of a merge: the merged model must be the model that was trained, measured on probe rows.

Each figure is the largest absolute difference of the logits at supervised tokens:

    float32         adapter and merged, both in float32: above LIMIT the run fails
    served_dtype    adapter and merged in the dtype that is served
    dtype_noise     the merged model in the served dtype and in float32: the error of that dtype alone

Float32 passes convert one module's weights at a time (heft_engine.model.float32_lm), and logits are compared a slice of
the vocabulary at a time, so that the check of a model of 7 billion parameters takes less than 1 GB beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from heft_engine.data.encoding import Example
from heft_engine.errors import TrainingError
from heft_engine.model.float32_lm import full_precision
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import micro_batches, pack
from heft_engine.runtime.devices import dtype_name
from heft_engine.runtime.out_of_memory import run_in_halves

LIMIT = 1e-3
#: Probe rows are a few short ones, because they also run in float32.
PROBE_ROWS = 8
#: Tokens of one pass over probe rows: memory is short beside a model that has just been trained.
TOKEN_BUDGET = 2_048
#: Bytes of a slice of the head in float32 and of the logits that are compared on it.
SLICE_BYTES = 64 * 1024**2


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
class ProbeStates:
    """Last hidden states at the supervised tokens of the probe rows, (tokens, hidden).

    served: in the dtype that is served. float32: of float32 passes.
    """

    served: Tensor
    float32: Tensor


@torch.inference_mode()
def compare(lm: PackedLM, adapted: ProbeStates, merged: ProbeStates, rows: int) -> Parity:
    """Returns the record of a merge. Raises TrainingError (parity_broken) above LIMIT.

    No adapter changes the head, so `lm` has the head of both.
    """
    pairs = (
        (adapted.float32, merged.float32),
        (adapted.served, merged.served),
        (merged.served, merged.float32),
    )
    float32, served_dtype, dtype_noise = _differences(lm, pairs)
    parity = Parity(
        float32=float32,
        served_dtype=served_dtype,
        dtype_noise=dtype_noise,
        dtype=dtype_name(lm.dtype),
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
def probe_states(lm: PackedLM, examples: Sequence[Example]) -> Tensor:
    """Returns the last hidden states at the supervised tokens, interventions disabled: (tokens, hidden)."""
    with lm.interventions.disabled():
        return torch.cat(
            [
                states
                for rows in micro_batches(examples, TOKEN_BUDGET)
                for states in run_in_halves(partial(_states, lm), rows, lm.device)
            ]
        )


def _states(lm: PackedLM, examples: Sequence[Example]) -> Tensor:
    batch = pack(examples)
    return lm.hidden(batch)[batch.supervised()[0]]


def _differences(lm: PackedLM, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """Returns the largest absolute difference of the logits of each pair of hidden states."""
    weight = lm.head.weight
    tokens, width = pairs[0][0].shape
    size = max(1, SLICE_BYTES // (4 * (width + 3 * tokens)))
    largest = [torch.zeros((), device=weight.device) for _ in pairs]
    with full_precision():
        for start in range(0, len(weight), size):
            part = slice(start, start + size)
            for index, (first, second) in enumerate(pairs):
                difference = lm.logits_of(first, part) - lm.logits_of(second, part)
                # torch.maximum hands NaN on, which Python's max would lose.
                largest[index] = torch.maximum(largest[index], difference.abs_().max())
    return [float(difference) for difference in largest]
