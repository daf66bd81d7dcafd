"""The part `attention`: one varlen call a layer against attention row by row, and a row's scores wherever it stands."""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import patch

import torch

from heft_engine.adapters.registry import attach
from heft_engine.config.train import LoraStage
from heft_engine.data.encoding import Example
from heft_engine.gpu_check.part import Findings, Target
from heft_engine.gpu_check.shapes import random_examples, random_model
from heft_engine.inference.scoring import score
from heft_engine.model import varlen_attention
from heft_engine.model.loss import supervised_loss
from heft_engine.model.packed_lm import PackedLM

#: Relative differences in bfloat16.
_LOSS_LIMIT, _GRADIENT_LIMIT, _SCORE_LIMIT = 2e-2, 1e-1, 5e-2


def check_attention(target: Target, findings: Findings) -> None:
    lengths = (300, 7, 1_024, 64, 640, 1) if not target.small else (9, 3, 30)
    lm = random_model(target.shape.config(layers=2), target.device, torch.bfloat16)
    examples = random_examples(lengths, lm.config.vocab_size)
    _compare_with_rows(lm, target, examples, findings)
    _compare_places(lm, examples, findings)


def _compare_with_rows(lm: PackedLM, target: Target, examples: list[Example], findings: Findings) -> None:
    supervised = [example.supervised() for example in examples]
    adapter = attach(lm, LoraStage(rank=8, learning_rate=1e-4, target_modules=list(lm.family.attention)))
    results = {}
    for name in ("varlen", "rows"):
        with (
            patch.object(varlen_attention, "is_supported", return_value=False)
            if name == "rows"
            else nullcontext()
        ):
            loss, count = supervised_loss(lm, supervised)
            (loss / count).backward()  # type: ignore[no-untyped-call]
            seconds = target.seconds(lambda: supervised_loss(lm, supervised)[0].backward())  # type: ignore[no-untyped-call]
        gradients = [p.grad.flatten() for p in adapter.parameters().values() if p.grad is not None]
        results[name] = (float(loss.detach()) / count, torch.cat(gradients) / 5)
        findings.figures[f"{name}_ms"] = round(1e3 * seconds, 2)
        for parameter in adapter.parameters().values():
            parameter.grad = None
    (varlen_loss, gradient), (rows_loss, expected) = results["varlen"], results["rows"]
    loss_difference = abs(varlen_loss - rows_loss) / abs(rows_loss)
    difference = float((gradient - expected).norm() / expected.norm().clamp_min(1e-30))
    findings.figures |= {"loss_difference": loss_difference, "gradient_difference": difference}
    findings.check(loss_difference <= _LOSS_LIMIT, f"the losses differ by {loss_difference:.2g}")
    findings.check(difference <= _GRADIENT_LIMIT, f"the gradients differ by {difference:.2g}")


def _compare_places(lm: PackedLM, examples: list[Example], findings: Findings) -> None:
    """Scores a row alone and at every place among the others: to rounding they are the same; are they to the bit?"""
    first, *others = examples
    (alone,) = (scores.totals for scores in score(lm, [first]))
    places = []
    for place in range(len(examples)):
        batch = [*others[:place], first, *others[place:]]
        places.append(score(lm, batch)[place].totals)
    differences = [
        abs(a - b) / max(1.0, abs(b)) for totals in places for a, b in zip(totals, alone, strict=True)
    ]
    findings.figures["places_with_equal_bits"] = (
        f"{sum(totals == alone for totals in places)} of {len(places)}"
    )
    findings.figures["score_difference"] = max(differences)
    findings.check(
        max(differences) <= _SCORE_LIMIT, f"a row's score moves by {max(differences):.2g} with its place"
    )
