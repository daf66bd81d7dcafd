"""How fast stage 2 gets down: the same intervention trained from the same beginning on two frozen models.

Every step is over all rows (no noise of batches), with AdamW at one rate, gradients clipped as in training. What is
compared is the number of steps to a loss that both reach; where the models begin at other losses, that is part of the
answer, so the curves are told whole. It does NOT know stages or bundles.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from heft_engine.data.encoding import Example
from heft_engine.diagnostics.curvature import Place
from heft_engine.model.packed_lm import PackedLM
from heft_engine.objectives.supervised import SupervisedObjective
from heft_engine.training.forward_pass import SuffixPass, split_by_tokens, summed_loss
from heft_engine.training.loop import BETAS, EPSILON, TOKEN_BUDGET


def descend(
    lm: PackedLM, place: Place, examples: Sequence[Example], *, rate: float, steps: int
) -> list[float]:
    """The mean loss per supervised token before each step and after the last: steps + 1 numbers."""
    own = replace(place, intervention=copy.deepcopy(place.intervention))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # R's completion to a square matrix is random
        own.intervention.unfreeze()
    forward, objective = SuffixPass(cache=own.cache(lm, examples)), SupervisedObjective()
    count = objective.count(examples)
    parameters = list(own.intervention.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=BETAS, eps=EPSILON, weight_decay=0.0)
    curve = []
    for _ in range(steps + 1):
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in split_by_tokens(forward.tokens, range(len(examples)), TOKEN_BUDGET):
            loss = summed_loss(forward, objective, part)
            (loss / count).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        curve.append(total / count)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return curve


def compare(
    before: Sequence[float], after: Sequence[float] | None, target: float | None = None
) -> dict[str, Any]:
    """Steps of each curve to `target`; by default the lowest loss that all reach. None where one does not."""
    goal = max(min(curve) for curve in (before, after) if curve is not None) if target is None else target
    told = {"target": goal, "steps_before": _first(before, goal), "before": list(before)}
    return told if after is None else {**told, "steps_after": _first(after, goal), "after": list(after)}


def _first(curve: Sequence[float], target: float) -> int | None:
    return next((step for step, loss in enumerate(curve) if loss <= target), None)
