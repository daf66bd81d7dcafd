"""Linear layers and activations in which a row's numbers don't depend on the rows beside it (batch invariance).

Matrix libraries choose the order of a product's sums by its shape and number of threads: a bfloat16 product of 160 rows
and one of 4,096 rows differ in the last bit, and 16 of 40 packed questions changed their scores with their neighbours.
Where that matters (HEFT_BATCH_INVARIANT=1, on a CPU) every product with a weight has one shape: so many rows of the
input, zeros beyond the last one, and a fixed part of the weight's outputs, computed by one thread. Inside one shape
every row is summed alike, wherever it stands. Threads share out whole blocks (heft_engine.runtime.parallel). Nothing is
measured, so nothing can change from one process to the next.

Activations have the same trouble: vector code and the scalar code for what is left at the end of a thread's share round
differently. They run on shares that leave nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode

from heft_engine.runtime.parallel import run_tasks, task_threads

LinearKernel = Callable[[Tensor, Tensor, Tensor | None], Tensor | None]

#: Rows of a block. A product begins by putting its weight into another order: blocks of 64 rows took 8 % longer, those
#: of 128 rows 2 % less, but one row alone of a hundred tokens fills those worse.
BLOCK_ROWS = 96
#: Of passes of one token a sequence, and of the head.
STEP_ROWS = 8
#: One row alone fills several threads: a weight is cut into at most so many parts, of so many outputs or more.
_MOST_PARTS, _PART_OUTPUTS = 4, 768
#: Parts begin at multiples of so many outputs, and blocks of inputs at such addresses: 64 bytes and more.
_ALIGNMENT = 64
#: A multiple of every vector loop's stride.
_STRIDE = 64


class BatchInvariantMode(TorchFunctionMode):
    """While active in a thread, linear layers multiply blocks of `block_rows` rows, and activations whole vectors.

    `kernel`: a linear layer that gives a row the same bits in any number; it returns None for weights that it does not
    support.
    """

    def __init__(self, block_rows: int = BLOCK_ROWS, kernel: LinearKernel | None = None) -> None:
        super().__init__()
        self.block_rows, self.kernel = block_rows, kernel

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.linear:
            return self.linear(*args, **(kwargs or {}))
        if func in (F.silu, F.gelu):
            return _activation(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (…, in), weight (out, in) → (…, out), as F.linear."""
        out = self.kernel(x, weight, bias) if self.kernel is not None else None
        if out is not None:
            return out
        rows = x.reshape(-1, x.shape[-1])
        return linear_in_blocks(rows, weight, bias, self.block_rows).view(*x.shape[:-1], len(weight))


def linear_in_blocks(x: Tensor, weight: Tensor, bias: Tensor | None, block_rows: int) -> Tensor:
    """F.linear of x (n, in), by products of one shape for each part of the weight."""
    padding = -len(x) % block_rows
    if padding or not x.is_contiguous() or x.data_ptr() % _ALIGNMENT:
        x = F.pad(x, (0, 0, 0, padding)) if padding else x.clone(memory_format=torch.contiguous_format)
    out = x.new_empty(len(x), len(weight))
    run_tasks(
        [
            partial(
                _product,
                x[row : row + block_rows],
                weight[part],
                None if bias is None else bias[part],
                out[row : row + block_rows, part],
            )
            for part in _parts(len(weight))
            for row in range(0, len(x), block_rows)
        ]
    )
    return out[: len(out) - padding]


def _parts(outputs: int) -> list[slice]:
    """Parts of a weight's outputs. They depend on the weight alone, not on the number of threads."""
    count = max(1, min(_MOST_PARTS, outputs // _PART_OUTPUTS))
    size = -(-outputs // (count * _ALIGNMENT)) * _ALIGNMENT
    return [slice(start, min(outputs, start + size)) for start in range(0, outputs, size)]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def _activation(func: Callable[..., Tensor], x: Tensor, **options: Any) -> Tensor:
    """An activation of x (…, width), of whole rows if these are whole vectors, else of one row at a time."""
    rows = x.reshape(-1, x.shape[-1])
    share = 1 if x.shape[-1] % _STRIDE else max(1, -(-len(rows) // task_threads()))
    if share >= len(rows):
        return func(x, **options)
    out = torch.empty_like(rows)

    def task(start: int) -> None:
        out[start : start + share] = func(rows[start : start + share], **options)

    run_tasks([partial(task, start) for start in range(0, len(rows), share)])
    return out.view(x.shape)
