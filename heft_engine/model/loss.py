"""Cross-entropy from last hidden states, never with more than a few tokens' logits in memory.

A token's logits are as many numbers as the vocabulary has words, several times over by the time its gradient is known:
2,000 supervised tokens of SmolLM2 would take 2 GB. The head is frozen, so each chunk's gradient is computed with its
loss, in the forward pass: nothing is stored and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from heft_engine.data.encoding import Example
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import pack
from heft_engine.runtime.transfers import index_tensor

#: Supervised tokens whose logits are in memory at a time.
CHUNK = 256
#: Gradients in float16 are kept as multiples of 1/1024 until the backward pass: below 6e-8 there are no numbers. Their
#: elements are at most twice the head's largest weight.
GRADIENT_SCALE = 1_024.0


class LossSums(NamedTuple):
    """Sums over supervised tokens, each a scalar."""

    loss: Tensor  #: in nats, differentiable
    correct: Tensor  #: tokens with the largest logit, as integers: the numerator of token accuracy


def supervised_loss(
    lm: PackedLM, examples: Sequence[Example], length: int | None = None
) -> tuple[Tensor, int]:
    """Returns the summed cross-entropy over the supervised tokens of packed examples, and their number.

    length: the pass is filled up to so many tokens.
    """
    batch = pack(examples, length=length)
    positions, targets = batch.supervised()
    hidden = lm.hidden(batch)
    return cross_entropy(lm, hidden[index_tensor(positions, hidden.device)], targets).loss, len(targets)


def cross_entropy(lm: PackedLM, hidden: Tensor, targets: list[int]) -> LossSums:
    """Returns the sums of hidden (n, hidden) and n target tokens; the loss is differentiable in hidden."""
    if torch.is_grad_enabled() and hidden.requires_grad and not lm.head.weight.requires_grad:
        return LossSums(*_CrossEntropy.apply(hidden, lm, targets))  # type: ignore[no-untyped-call]
    return _total([_sums(lm, *chunk) for chunk in _chunks(hidden, targets)])


def logits_bytes(lm: PackedLM, tokens: int) -> int:
    """Returns the memory that `cross_entropy` of so many tokens takes for one chunk.

    These are its logits in the model's dtype and in float32, their softmax and two gradients.
    """
    return min(CHUNK, tokens) * int(lm.config.vocab_size) * (4 * 4 + 2 * lm.dtype.itemsize)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, lm: PackedLM, targets: list[int]) -> tuple[Tensor, Tensor]:
        parts: list[LossSums] = []
        gradients: list[Tensor] = []
        for chunk, chunk_targets in _chunks(hidden, targets):
            with torch.enable_grad():
                leaf = chunk.detach().requires_grad_()
                sums = _sums(lm, leaf, chunk_targets)
                is_scaled = hidden.dtype == torch.float16
                loss = sums.loss * GRADIENT_SCALE if is_scaled else sums.loss
                gradients += torch.autograd.grad(loss, leaf)
            parts.append(LossSums(sums.loss.detach(), sums.correct))
        ctx.save_for_backward(torch.cat(gradients))
        total = _total(parts)
        ctx.mark_non_differentiable(total.correct)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        factor = grad_outputs[0].to(gradient.device)
        if gradient.dtype == torch.float16:
            return (gradient.float() * (factor / GRADIENT_SCALE)).to(gradient.dtype), None, None
        return gradient * factor, None, None


def _chunks(hidden: Tensor, targets: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    target_ids = index_tensor(targets, hidden.device)
    return zip(torch.split(hidden, CHUNK), torch.split(target_ids, CHUNK), strict=True)


def _sums(lm: PackedLM, hidden: Tensor, targets: Tensor) -> LossSums:
    logits = lm.logits(hidden)
    targets = targets.to(logits.device)
    correct = (logits.detach().argmax(-1) == targets).sum()
    return LossSums(F.cross_entropy(logits, targets, reduction="sum"), correct)


def _total(parts: Sequence[LossSums]) -> LossSums:
    losses, correct = zip(*parts, strict=True)
    return LossSums(torch.stack(losses).sum(), torch.stack(correct).sum())
