"""Training that runs out of memory: the same work again with half the token budget, for as long as rows share passes.

The random state is restored before, so the result is that of a stage that had the smaller budget from this work on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from heft_engine.errors import TrainingError
from heft_engine.runtime.out_of_memory import free_memory, is_out_of_memory
from heft_engine.runtime.random_state import RandomState
from heft_engine.training.forward_pass import ForwardPass, split_by_tokens

R = TypeVar("R")


def run_in_smaller_passes(
    work: Callable[[int], R],
    forward: ForwardPass,
    rows: Sequence[int],
    token_budget: int,
    on_shrink: Callable[[int], None],
) -> R:
    """Returns what `work` returns for a token budget: the given one, or the first of its halves that fits.

    work: passes over `rows` of `forward`, which can be repeated. on_shrink: called with each smaller budget before its
    try. Raises TrainingError (out_of_memory) when a row alone does not fit.
    """
    while True:
        state = RandomState.current()
        try:
            return work(token_budget)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        state.restore()
        free_memory(forward.lm.device)
        token_budget = _half(forward, rows, token_budget)
        on_shrink(token_budget)


def _half(forward: ForwardPass, rows: Sequence[int], token_budget: int) -> int:
    """Returns half the tokens of the largest pass that rows share."""
    passes = split_by_tokens(forward.tokens, rows, token_budget)
    shared = [sum(map(forward.tokens, part)) for part in passes if len(part) > 1]
    if shared:
        return max(shared) // 2
    longest = max(map(forward.tokens, rows))
    message = (
        f"the device ran out of memory in a pass over one row alone, of {longest} tokens at most: lower max_length, "
        "choose a smaller model, or give the worker more memory"
    )
    raise TrainingError(message, param="max_length", code="out_of_memory")
