"""The supervised objective: cross-entropy over the tokens of right answers."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from probe_models import packed, probes

from heft_engine.model.packing import pack
from heft_engine.objectives.supervised import SupervisedObjective


def test_the_loss_is_the_summed_cross_entropy_of_the_answers(tiny_llama_dir: Path) -> None:
    lm, examples = packed(tiny_llama_dir), probes()
    batch = pack(examples)
    positions, targets = batch.supervised()
    hidden = lm.hidden(batch)[positions].detach().requires_grad_()
    loss = SupervisedObjective().loss(lm, hidden, examples)
    expected = F.cross_entropy(lm.logits(hidden), torch.tensor(targets), reduction="sum")
    torch.testing.assert_close(loss, expected)
    (gradient,), (expected_gradient,) = (torch.autograd.grad(value, hidden) for value in (loss, expected))
    torch.testing.assert_close(gradient, expected_gradient)
    assert SupervisedObjective().count(examples) == len(targets)


def test_logits_are_counted_for_one_chunk(tiny_llama_dir: Path) -> None:
    lm, objective = packed(tiny_llama_dir), SupervisedObjective()
    token = objective.loss_bytes(lm, 1)
    assert token >= 5 * 4 * lm.config.vocab_size
    assert objective.loss_bytes(lm, 256) == objective.loss_bytes(lm, 5_000) == 256 * token
