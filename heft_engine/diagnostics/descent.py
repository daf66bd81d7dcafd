"""Descent of stage 2's loss: the same initial intervention, trained on two frozen models.

Every step is over all rows, so that batches add no noise, with AdamW at a constant learning rate and gradients clipped
as in training. The comparison is the number of steps to a loss that both models reach. The whole curves are reported
too, because the models start at different losses.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from heft_engine.data.encoding import Example
from heft_engine.diagnostics.curvature import InitialIntervention
from heft_engine.model.packed_lm import PackedLM
from heft_engine.objectives.supervised import SupervisedObjective
from heft_engine.training.forward_pass import SuffixPass, split_by_tokens, summed_loss
from heft_engine.training.optimization.optimizer import BETAS, EPSILON
from heft_engine.training.progress import TOKEN_BUDGET


def descend(
    lm: PackedLM, initial: InitialIntervention, examples: Sequence[Example], *, rate: float, steps: int
) -> list[float]:
    """Returns the mean loss per supervised token (nats) before each step and after the last: steps + 1 numbers."""
    trained = replace(initial, intervention=copy.deepcopy(initial.intervention))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # R's completion to a square matrix is random
        trained.intervention.unfreeze()
    forward, objective = SuffixPass(cache=trained.cache(lm, examples)), SupervisedObjective()
    count = objective.count(examples)
    parameters = list(trained.intervention.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=BETAS, eps=EPSILON, weight_decay=0.0)
    curve = []
    for _ in range(steps + 1):
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for micro_batch in split_by_tokens(forward.tokens, range(len(examples)), TOKEN_BUDGET):
            loss = summed_loss(forward, objective, micro_batch)
            (loss / count).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        curve.append(total / count)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return curve


def compare(
    before: Sequence[float], after: Sequence[float] | None, target: float | None = None
) -> dict[str, Any]:
    """Returns each curve's steps to `target` (None: the lowest loss that both reach); None where it is not reached."""
    if target is None:
        target = max(min(curve) for curve in (before, after) if curve is not None)
    record = {"target": target, "steps_before": _steps_to(before, target), "before": list(before)}
    if after is not None:
        record |= {"steps_after": _steps_to(after, target), "after": list(after)}
    return record


def _steps_to(curve: Sequence[float], target: float) -> int | None:
    return next((step for step, loss in enumerate(curve) if loss <= target), None)
