"""Floating-point operations of a training stage, computed from token counts and model sizes.

    forward     per layer and token 2 · P, with P weights in the layer (Kaplan et al., arXiv 2001.08361, section 2.1);
                per layer and row 2 · w · n² for attention over n tokens (w: width of all heads; causal, so half of
                4 · w · n²)
    backward    2 · P wherever a gradient passes, and twice attention's forward, since both factors get gradients. Base
                weights are frozen and get none, so training costs 4 · P a token instead of the usual 6 · P
    head        2 · P_head forward and as much backward for each supervised token; other tokens never reach it
    adapter     6 · LoRA's parameters a token. LoReFT's few parameters on a few tokens are neglected

Activations that are cached (heft_engine.training.activation_cache) count once, layers that are recomputed (gradient
checkpointing) twice. Evaluation and merge checks are not included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class CacheLevel(StrEnum):
    """The part of a stage's frozen activations that is cached. Checkpoints carry the values."""

    KV = "keys_values"  #: hidden states of the suffix, keys and values of the tokens before it
    HIDDEN_STATES = "states"  #: every token's hidden state at the first trained layer
    NONE = "nothing"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model. `layers`: their number; `layer`, `head`: weights in one of them; `width`: of all heads."""

    layers: int
    layer: int
    head: int
    width: int


@dataclass(frozen=True, kw_only=True)
class RowTokens:
    """Token counts of a training row. `suffix`: tokens from the first intervened or supervised one on."""

    total: int
    suffix: int
    supervised: int


@dataclass(frozen=True, kw_only=True)
class StageWork:
    """Settings of a stage that decide its operations. `first_layer`: the lowest one that gets a gradient."""

    level: CacheLevel
    first_layer: int
    epochs: float
    adapter: int = 0  #: LoRA's trained parameters
    checkpointing: bool = False


def stage_flops(shape: Shape, rows: Sequence[RowTokens], work: StageWork) -> int:
    """Operations of the whole stage, all epochs, over these rows."""
    upper = shape.layers - work.first_layer
    supervised = sum(row.supervised for row in rows)
    full_forward = sum(_forward(shape, row.total, row.total) for row in rows)
    once, epoch, trained = 0, 4 * shape.head * supervised, [(row.total, row.total) for row in rows]
    if work.level == CacheLevel.NONE:
        epoch += work.first_layer * full_forward
    else:
        trained = [(row.total, row.suffix) for row in rows]
        # The prefix of each row in the upper layers is computed once, or once per epoch from cached hidden states.
        prefix = sum(_forward(shape, row.total - row.suffix, row.total - row.suffix) for row in rows)
        once += work.first_layer * full_forward + (upper * prefix if work.level == CacheLevel.KV else 0)
        epoch += upper * prefix if work.level == CacheLevel.HIDDEN_STATES else 0
    forward = sum(_forward(shape, *row) for row in trained)
    backward = forward + sum(_attention(shape, *row) for row in trained)
    epoch += upper * ((2 if work.checkpointing else 1) * forward + backward)
    epoch += 6 * work.adapter * sum(run for _, run in trained)
    return round(once + work.epochs * epoch)


def _forward(shape: Shape, total: int, run: int) -> int:
    """One layer's operations for the last `run` of a row's `total` tokens."""
    return 2 * shape.layer * run + _attention(shape, total, run)


def _attention(shape: Shape, total: int, run: int) -> int:
    """Products with keys and values, for each of the last `run` tokens with all tokens before it."""
    return 2 * shape.width * run * (2 * total - run)
