"""The loss of supervised tokens from last hidden states, never with more than a few tokens' logits in memory.

A token's logits are as many numbers as the vocabulary has words, several times over by the time its gradient is known:
2,000 supervised tokens of SmolLM2 would take 2 GB. The head is frozen, so each chunk's gradient is computed with its
loss, in the forward pass: nothing is kept and nothing is computed twice. It does NOT know rows or layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from heft_engine.model.packed_lm import PackedLM

#: Supervised tokens whose logits are in memory at a time.
CHUNK = 256


def cross_entropy(lm: PackedLM, hidden: Tensor, targets: list[int]) -> Tensor:
    """Sum of the cross-entropy (nats) of hidden (n, hidden) against n target tokens, differentiable in hidden."""
    if torch.is_grad_enabled() and hidden.requires_grad and not lm.head.weight.requires_grad:
        total: Tensor = _CrossEntropy.apply(hidden, lm, targets)  # type: ignore[no-untyped-call]
        return total
    return torch.stack([_loss(lm, part, wanted) for part, wanted in _chunks(hidden, targets)]).sum()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, lm: PackedLM, targets: list[int]) -> Tensor:
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for part, wanted in _chunks(hidden, targets):
            with torch.enable_grad():
                own = part.detach().requires_grad_()
                loss = _loss(lm, own, wanted)
                gradients += torch.autograd.grad(loss, own)
            losses.append(loss.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (change,) = ctx.saved_tensors
        return change * gradients[0], None, None


def _chunks(hidden: Tensor, targets: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    wanted = torch.tensor(targets, device=hidden.device)
    return zip(torch.split(hidden, CHUNK), torch.split(wanted, CHUNK), strict=True)


def _loss(lm: PackedLM, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = lm.logits(hidden)
    return F.cross_entropy(logits, targets.to(logits.device), reduction="sum")
