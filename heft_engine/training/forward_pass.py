"""Forward passes of training: the whole model each time, or its trained part on cached activations.

Both give the last hidden states that predict the answers' tokens, equal to rounding. What is made of them is for the
objective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from heft_engine.config.flops import CacheLevel
from heft_engine.data.encoding import Example
from heft_engine.model.loss import LossSums
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import fill, pack, packed_length
from heft_engine.objectives.objective import Objective
from heft_engine.runtime.transfers import index_tensor
from heft_engine.training.activation_cache import SuffixCache

#: So many tokens of which keys and values are cached count as one that runs.
CACHED_TOKENS_PER_TOKEN = 4
#: Probe rows are so many, the shortest of the first so many.
_PROBE_ROWS, _PROBE_CANDIDATES = 4, 64


class ForwardPass(Protocol):
    """Examples that can be run by index."""

    @property
    def lm(self) -> PackedLM: ...
    @property
    def examples(self) -> Sequence[Example]: ...
    def share(self, rows: Sequence[int]) -> Sequence[int]:
        """Returns those of some examples that this process runs; the others run on other ranks."""

    def tokens(self, index: int) -> int:
        """Returns how much of a micro-batch's token budget an example takes."""

    def hidden(self, indices: Sequence[int]) -> Tensor:
        """Returns the last hidden states that predict the answers' tokens, example by example: (tokens, hidden)."""


@dataclass(frozen=True, kw_only=True)
class FullPass:
    """The whole model, every time."""

    lm: PackedLM
    examples: Sequence[Example]

    def share(self, rows: Sequence[int]) -> Sequence[int]:
        return rows

    def tokens(self, index: int) -> int:
        return packed_length(self.examples[index])

    def hidden(self, indices: Sequence[int]) -> Tensor:
        examples = [self.examples[index] for index in indices]
        batch = pack(examples, length=fill(self.lm.device, sum(map(packed_length, examples))))
        hidden = self.lm.hidden(batch)
        return hidden[index_tensor(batch.supervised()[0], hidden.device)]


@dataclass(frozen=True, kw_only=True)
class SuffixPass:
    """The suffixes of the examples through the upper layers, on a cache of the rest."""

    cache: SuffixCache

    @property
    def lm(self) -> PackedLM:
        return self.cache.lm

    @property
    def examples(self) -> Sequence[Example]:
        return self.cache.examples

    def share(self, rows: Sequence[int]) -> Sequence[int]:
        return rows

    def tokens(self, index: int) -> int:
        row = self.cache.rows[index]
        return pass_tokens(self.cache.level, row.example, row.prefix_length)

    def hidden(self, indices: Sequence[int]) -> Tensor:
        lm, boundary = self.lm, self.cache.boundary
        states, positions, layout = self.cache.suffix(indices)
        for placed in boundary.interventions:
            states = placed.apply(states, layout)
        states = lm.run_layers(states, positions, layout, boundary.layer, lm.n_layers)
        reads: list[int] = []
        for row, index in zip(layout.rows, indices, strict=True):
            prompt_end = row.start + row.prompt - row.cached_tokens - 1
            reads += range(prompt_end, prompt_end + len(self.examples[index].answers[0]))
        return lm.finish(states)[0, index_tensor(reads, states.device)]


def pass_tokens(level: CacheLevel, example: Example, cached: int) -> int:
    """Returns how much of a token budget an example takes whose first `cached` tokens lie before its suffix."""
    if level != CacheLevel.KV:
        return packed_length(example)
    # Cached keys and values are copied beside those of the other rows: they count, though they cost little.
    return packed_length(example) - cached + cached // CACHED_TOKENS_PER_TOKEN


def loss_sums(forward: ForwardPass, objective: Objective, indices: Sequence[int]) -> LossSums:
    """Returns the objective's sums of some examples, in one pass."""
    examples = [forward.examples[index] for index in indices]
    return objective.loss(forward.lm, forward.hidden(indices), examples)


def summed_loss(forward: ForwardPass, objective: Objective, indices: Sequence[int]) -> Tensor:
    """Returns the objective's summed loss of some examples, in one pass."""
    return loss_sums(forward, objective, indices).loss


@torch.inference_mode()
def probe_states(forward: ForwardPass) -> Tensor:
    """Returns hidden states of a few short rows, through the cache: whole rows would take longer than steps."""
    examples = forward.examples
    candidates = forward.share(range(len(examples)))[:_PROBE_CANDIDATES]
    shortest = sorted(candidates, key=lambda row: packed_length(examples[row]))[:_PROBE_ROWS]
    return forward.hidden(shortest).float().cpu()


def added_up(sums: Sequence[LossSums], device: torch.device) -> Tensor:
    """Returns the sums of all passes, (2,) in float64: loss and correct tokens."""
    if not sums:
        return torch.zeros(2, dtype=torch.float64, device=device)
    return torch.stack([torch.stack([loss.double(), correct.double()]) for loss, correct in sums]).sum(0)


def split_by_tokens(
    tokens_of: Callable[[int], int], indices: Sequence[int], token_budget: int
) -> list[list[int]]:
    """Splits indices into micro-batches of at most `token_budget` tokens, in order; a longer example goes alone."""
    micro_batches: list[list[int]] = []
    room = 0
    for index in indices:
        tokens = tokens_of(index)
        if not micro_batches or tokens > room:
            micro_batches.append([])
            room = token_budget
        micro_batches[-1].append(index)
        room -= tokens
    return micro_batches
