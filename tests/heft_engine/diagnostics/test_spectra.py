"""Intruder dimensions in a report on weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heft_engine.adapters.lora.weights import LoraWeights
from heft_engine.diagnostics.spectra import weight_report


def planted(strength: float) -> tuple[Tensor, LoraWeights, Tensor, Tensor]:
    """A weight whose singular vectors are the axes, and an adapter that brings a direction far from all of them."""
    weight = torch.diag(torch.linspace(10, 1, 32))
    left, right = torch.full((32,), 32**-0.5), torch.full((32,), 32**-0.5)
    return weight, adapter(strength * torch.outer(left, right)), left, right


def adapter(delta: Tensor) -> LoraWeights:
    factors = {"q": (torch.eye(32), delta)}
    return LoraWeights(factors=factors, scaling=1.0, rank=32, alpha=32, target_modules=["q"], layers=None)


def test_a_planted_intruder_is_reported_and_so_is_its_repair_by_a_later_stage() -> None:
    weight, brings, left, right = planted(40)
    takes = adapter(-40 * torch.outer(left, right))
    calls: list[None] = []
    alone = weight_report([brings], lambda _: weight, lambda: calls.append(None))
    assert alone["stages"] == [
        {
            "adapter": 0,
            "matrices": 1,
            "matrices_with_intruders": 1,
            "intruders": 1,
            "share": 0.1,
            "repaired_later": 0,
        }
    ]
    (module,) = alone["modules"]
    assert module["stages"][0]["strength_at_the_end"] == pytest.approx([1.0], abs=1e-4)
    assert module["after"]["singular_values"][0] > 39
    assert module["before"]["stable_rank"] == pytest.approx(
        float((weight**2).sum()) / module["before"]["singular_values"][0] ** 2, rel=1e-4
    )
    assert len(calls) == 1
    both = weight_report([brings, takes], lambda _: weight, lambda: None)
    assert [stage["intruders"] for stage in both["stages"]] == [1, 0]
    assert both["stages"][0]["repaired_later"] == 1
    (strength,) = both["modules"][0]["stages"][0]["strength_at_the_end"]
    assert abs(strength) < 0.2
    assert not math.isnan(both["modules"][0]["relative_change"])
