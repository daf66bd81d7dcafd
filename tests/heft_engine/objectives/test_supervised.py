"""The supervised objective: cross-entropy over the tokens of right answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from probe_models import packed, probes

from heft_engine.model import loss
from heft_engine.model.packing import pack
from heft_engine.objectives.supervised import SupervisedObjective


def test_the_loss_is_the_summed_cross_entropy_of_the_answers(tiny_llama_dir: Path) -> None:
    lm, examples = packed(tiny_llama_dir), probes()
    batch = pack(examples)
    positions, targets = batch.supervised()
    hidden = lm.hidden(batch)[positions].detach().requires_grad_()
    total, correct = SupervisedObjective().loss(lm, hidden, examples)
    logits = lm.logits(hidden)
    expected = F.cross_entropy(logits, torch.tensor(targets), reduction="sum")
    torch.testing.assert_close(total, expected)
    (gradient,), (expected_gradient,) = (torch.autograd.grad(value, hidden) for value in (total, expected))
    torch.testing.assert_close(gradient, expected_gradient)
    assert SupervisedObjective().count(examples) == len(targets)
    assert not correct.requires_grad
    assert int(correct) == int((logits.argmax(-1) == torch.tensor(targets)).sum())


@pytest.mark.parametrize("with_gradient", [True, False])
def test_tokens_with_the_largest_logit_are_correct(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, with_gradient: bool
) -> None:
    """Two thirds of the targets are what the model predicts, over several chunks."""
    monkeypatch.setattr(loss, "CHUNK", 8)
    lm = packed(tiny_llama_dir)
    torch.manual_seed(0)
    hidden = torch.randn(30, lm.hidden_size).requires_grad_(with_gradient)
    predicted = lm.logits(hidden).argmax(-1)
    targets = [int(token) + (index % 3 == 0) for index, token in enumerate(predicted)]
    assert int(loss.cross_entropy(lm, hidden, targets).correct) == 20


def test_logits_are_counted_for_one_chunk(tiny_llama_dir: Path) -> None:
    lm, objective = packed(tiny_llama_dir), SupervisedObjective()
    token = objective.loss_bytes(lm, 1)
    assert token >= 5 * 4 * lm.config.vocab_size
    assert objective.loss_bytes(lm, 256) == objective.loss_bytes(lm, 5_000) == 256 * token
