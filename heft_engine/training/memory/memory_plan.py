"""Predicts the memory of a stage before it starts, and chooses micro-batches that fit.

The bytes that a forward pass saves for its gradient are measured on a few synthetic tokens, which holds for every
family, dtype and adapter, and then added up for the rows as they will be packed. `batch_size` does not matter: a step
is split into micro-batches that fit. The longest row must fit alone; if it does not, gradient checkpointing is switched
on; if that does not help, the stage fails before it starts and says which length would fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from heft_engine.data.encoding import Example
from heft_engine.errors import TrainingError
from heft_engine.model.causal_attention import LONGEST_MATRIX, STEP
from heft_engine.model.loss import supervised_loss
from heft_engine.model.nf4 import quantized_sizes
from heft_engine.model.packed_lm import PackedLM
from heft_engine.runtime import malloc

#: Times the saved bytes on a CPU: temporaries, and fragmentation. Measured (benchmarks/RESULTS.md).
_CPU_OVERHEAD = 1.35
#: On a GPU temporaries are counted; this is for fragmentation. Simulated (tests/heft_engine/on_gpu/test_memory.py).
_GPU_OVERHEAD = 1.1
#: Gradients of one layer's intermediate results that are there at a time, as multiples of what it saves.
_TEMPORARIES = 2.0
#: Machine code that oneDNN compiles for the matrix products of one pass length, and for all that it caches.
_CODE_PER_LENGTH, _MAX_CODE = 16_000_000, 230_000_000
_PROBES = ((64,), (32, 32), (128,))
_SMALLEST_LENGTH = 64


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of a pass with a gradient: fixed + per_token · Σn + per_square · Σn² over its rows.

    The squares are attention weights, of rows padded to STEP; rows longer than `longest_square` save none.
    """

    fixed: float
    per_token: float
    per_square: float
    longest_square: float = math.inf

    def of(self, lengths: Sequence[int]) -> float:
        squares = sum(_padded(length) ** 2 for length in lengths if length <= self.longest_square)
        return self.fixed + self.per_token * sum(lengths) + self.per_square * squares

    def plus(self, other: Footprint, share: float) -> Footprint:
        """Returns the footprint of this pass and of a share of another one at a time."""
        return replace(
            self,
            fixed=self.fixed + share * other.fixed,
            per_token=self.per_token + share * other.per_token,
            per_square=self.per_square + share * other.per_square,
        )

    def longest(self, room: float) -> int:
        """Returns the longest row whose pass takes at most `room` bytes; 0 when none does."""
        low, high = 0, 1 << 20
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.of([middle]) <= room else (low, middle - 1)
        return low


def _padded(length: int) -> int:
    return -(-length // STEP) * STEP


def overhead(device: torch.device) -> float:
    """Returns by how much a footprint on a device is multiplied."""
    return _CPU_OVERHEAD if device.type == "cpu" else _GPU_OVERHEAD


def peak_footprint(lm: PackedLM, layers: int, *, checkpointing: bool) -> Footprint:
    """Returns the footprint of a forward and backward pass with a gradient in so many layers.

    With checkpointing the backward pass computes what one layer saves again. On a GPU a layer's gradients count, too.
    """
    plain = footprint(lm)
    shares = _TEMPORARIES / layers if lm.device.type != "cpu" else 0.0
    if not checkpointing:
        return plain.plus(plain, shares)
    lm.checkpointing = True
    try:
        return footprint(lm).plus(plain, shares + 1 / layers)
    finally:
        lm.checkpointing = False


def footprint(lm: PackedLM) -> Footprint:
    """Returns the footprint, measured on passes of 64 to 128 synthetic tokens with the attached adapter."""
    one_row, two_rows, long_row = (_saved_bytes(lm, lengths) for lengths in _PROBES)
    # One row and two: the same tokens, squares 4,096 and 2,048. Long row: twice the tokens, squares 16,384.
    per_square = max(0.0, (one_row - two_rows) / 2_048)
    per_token = max(0.0, (long_row - one_row - per_square * (16_384 - 4_096)) / 64)
    # With soft caps or windows, rows of every length save their attention weights.
    names = ("attn_logit_softcapping", "sliding_window")
    always = any(getattr(lm.config, name, None) is not None for name in names)
    return Footprint(
        fixed=max(0.0, one_row - 64 * per_token - 4_096 * per_square),
        per_token=per_token,
        per_square=per_square,
        longest_square=math.inf if always else LONGEST_MATRIX,
    )


def _saved_bytes(lm: PackedLM, lengths: Sequence[int]) -> int:
    """Returns the bytes of all storages that a pass over rows of these lengths saves, without the model's weights."""
    weights = {tensor.untyped_storage()._cdata for tensor in lm.model.state_dict().values()}
    sizes: dict[int, int] = {}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in sizes:
            sizes[storage._cdata] = storage.nbytes()
            saved.append(tensor.detach())  # so that no address is reused
        # Detached: a node that keeps its own output would keep itself, and the pass's memory, for good.
        return tensor.detach()

    examples = [Example(prompt=(1,) * n, answers=((1,),), labels=("",), gold=0) for n in lengths]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        supervised_loss(lm, examples)
    return sum(sizes.values())


def code_bytes(lm: PackedLM, lengths: int) -> int:
    """Returns the bytes of machine code for passes of so many lengths. Float32 products need none per length."""
    if lm.device.type != "cpu" or lm.dtype == torch.float32:
        return 0
    return min(_MAX_CODE, lengths * _CODE_PER_LENGTH)


def pass_bytes(lm: PackedLM, tokens: int) -> int:
    """Returns the bytes of a pass without a gradient over so many tokens: the widest layer's intermediate results."""
    width = int(getattr(lm.config, "intermediate_size", 4 * lm.hidden_size))
    return tokens * (8 * lm.hidden_size + 4 * width) * lm.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A choice of micro-batches. bytes: saved by the largest pass."""

    token_budget: int
    checkpointing: bool
    bytes: int


def fit(
    room: float,
    most: int,
    largest: Callable[[Footprint, int], float],
    longest_row: int,
    measured: Callable[[bool], Footprint],
    kind: str,
) -> Fit:
    """Returns the largest token budget, at most `most`, whose passes fit into `room` bytes.

    largest(footprint, budget): bytes of the stage's largest pass. measured(checkpointing): the footprint.
    Raises TrainingError (out_of_memory) when the longest row does not fit alone.
    """
    for checkpointing in (False, True):
        footprint, budget = measured(checkpointing), most
        while True:
            needed = largest(footprint, budget)
            if needed <= room:
                return Fit(token_budget=budget, checkpointing=checkpointing, bytes=int(needed))
            if budget <= longest_row:
                break
            budget = max(budget // 2, 1)
    length = footprint.longest(room)
    advice = (
        f"max_length {length} would fit"
        if length >= _SMALLEST_LENGTH
        else "no useful length fits: take a smaller model or a machine with more memory"
    )
    message = (
        f"stage {kind} needs {needed / 1e9:.2g} GB for a row of {longest_row} tokens and {max(0.0, room) / 1e9:.2g} GB "
        f"are free for it; {advice}. batch_size does not matter: a step is split into micro-batches that fit"
    )
    raise TrainingError(message, param="max_length", code="out_of_memory")


@contextmanager
def peak(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Yields a function that returns the peak memory of this process since, in bytes; None if that is unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    malloc.trim()  # so that it does not count what an earlier stage left
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is resident now
    yield _highest_resident


def _highest_resident() -> int | None:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1_024
    return None


def dequantized_bytes(lm: PackedLM) -> int:
    """Returns the bytes of the largest weight that is dequantised for a product, forward and backward."""
    return 2 * lm.dtype.itemsize * max(quantized_sizes(lm.layers), default=0)


def gradient_bytes(parameters: Sequence[Tensor]) -> int:
    """Returns the bytes of the gradients and Adam's two moments; on a CPU also of a step's backup.

    That holds parameters and moments (heft_engine.training.optimization).
    """
    copies = [6 if parameter.device.type == "cpu" else 3 for parameter in parameters]
    return sum(
        count * parameter.numel() * parameter.element_size()
        for count, parameter in zip(copies, parameters, strict=True)
    )
