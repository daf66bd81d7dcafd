"""How much arithmetic a stage takes: floating-point operations, counted from the tokens that it runs.

    forward     2 · P a token and layer, P being the layer's weights (Kaplan et al., arXiv 2001.08361, section 2.1),
                and 2 · w · n² a row and layer for attention (w: width of all heads; causal, so half of 4 · w · n²)
    backward    the same again where a gradient passes, and twice attention's, both of whose factors need one. The base
                is frozen: its weights get no gradient, so training costs 4 · P a token instead of the usual 6 · P
    head        2 · P_head forward and as much backward for each supervised token; it reads no others
    adapter     6 times LoRA's parameters a token. LoReFT's few on a few tokens are left out

What is computed once (heft_engine.training.activation_cache) is counted once, and layers that run twice (gradient
checkpointing)
twice. Evaluation and checks are no part of it. It does NOT know models or torch: sizes go in, a number comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class CacheLevel(StrEnum):
    """How much of a stage's frozen part is cached. Checkpoints carry the values."""

    KV = "keys_values"  #: hidden states of the suffix, keys and values of the tokens before it
    HIDDEN_STATES = "states"  #: every token's hidden state at the first trained layer
    NONE = "nothing"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's sizes. `layer`: weights of one decoder layer. `width`: of all attention heads together."""

    layers: int
    layer: int
    head: int
    width: int


@dataclass(frozen=True, kw_only=True)
class RowTokens:
    """A training row: all its tokens, and those from the first on that training can change or that is read."""

    total: int
    suffix: int
    supervised: int


@dataclass(frozen=True, kw_only=True)
class StageWork:
    """How a stage runs: `first_layer` is the lowest one that its gradient reaches."""

    level: CacheLevel
    first_layer: int
    epochs: float
    adapter: int = 0  #: trained parameters of LoRA
    checkpointing: bool = False


def stage_flops(shape: Shape, rows: Sequence[RowTokens], work: StageWork) -> int:
    """Operations of the whole stage over these rows."""
    upper = shape.layers - work.first_layer
    supervised = sum(row.supervised for row in rows)
    whole = sum(_forward(shape, row.total, row.total) for row in rows)
    once, epoch, trained = 0, 4 * shape.head * supervised, [(row.total, row.total) for row in rows]
    if work.level == CacheLevel.NONE:
        epoch += work.first_layer * whole
    else:
        trained = [(row.total, row.suffix) for row in rows]
        # Keys and values of the upper layers are kept, or computed again each epoch from the states below.
        left = sum(_forward(shape, row.total - row.suffix, row.total - row.suffix) for row in rows)
        once += work.first_layer * whole + (upper * left if work.level == CacheLevel.KV else 0)
        epoch += upper * left if work.level == CacheLevel.HIDDEN_STATES else 0
    forward = sum(_forward(shape, *row) for row in trained)
    backward = forward + sum(_attention(shape, *row) for row in trained)
    epoch += upper * ((2 if work.checkpointing else 1) * forward + backward)
    epoch += 6 * work.adapter * sum(run for _, run in trained)
    return round(once + work.epochs * epoch)


def _forward(shape: Shape, total: int, run: int) -> int:
    """One layer over the last `run` tokens of a row of `total`."""
    return 2 * shape.layer * run + _attention(shape, total, run)


def _attention(shape: Shape, total: int, run: int) -> int:
    """Each of the last `run` tokens attends to all before it: a product with the keys and one with the values."""
    return 2 * shape.width * run * (2 * total - run)
