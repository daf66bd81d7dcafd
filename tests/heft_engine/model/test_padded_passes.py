"""Passes are padded to a few lengths, with tokens that change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_runs import LORA, but

from heft_engine.adapters.lora.adapter import LoraAdapter
from heft_engine.data.encoding import Example
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.base_models import load_model, resolve_path
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import Batch, filled_length, pack
from heft_engine.objectives.supervised import SupervisedObjective
from heft_engine.training import forward_pass
from heft_engine.training.forward_pass import FullPass, summed_loss

ROWS = [Example(prompt=(7, 8, 9) * n, answers=((5, n),), labels=("",), gold=0) for n in (1, 7, 12)]


def test_passes_have_few_lengths() -> None:
    lengths = [filled_length(tokens) for tokens in range(1, 4_097)]
    assert all(filled >= tokens for tokens, filled in enumerate(lengths, 1))
    assert all(filled - tokens < max(16, tokens / 8) for tokens, filled in enumerate(lengths, 1))
    assert len({filled for filled in lengths if filled <= 1_536}) == 40
    assert [filled_length(tokens) for tokens in (0, 1, 16, 130, 512, 513, 1_025)] == [
        *(0, 16, 16, 144),
        *(512, 576, 1_088),
    ]


def test_a_filled_batch_has_a_row_that_nobody_reads() -> None:
    plain, filled = pack(ROWS), pack(ROWS, length=80)
    assert (plain.tokens, filled.tokens) == (63, 80)
    assert filled.supervised() == plain.supervised()
    assert torch.equal(filled.input_ids[:63], plain.input_ids)
    assert torch.equal(filled.position_ids[63:], torch.arange(17))
    assert filled.layout.rows[:-1] == plain.layout.rows
    assert pack(ROWS, length=63).layout == plain.layout


def test_a_filled_pass_has_the_same_loss_and_gradient(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = PackedLM(load_model(resolve_path(tiny_llama_dir), dtype=torch.float32, attention=IMPLEMENTATION))
    torch.manual_seed(0)
    trainable = LoraAdapter.attach(lm, but(LORA, target_modules=["q_proj", "v_proj"]))
    lengths: list[int] = []
    hidden = lm.hidden

    def recording(batch: Batch) -> torch.Tensor:
        lengths.append(batch.tokens)
        return hidden(batch)

    monkeypatch.setattr(lm, "hidden", recording)

    def computed() -> tuple[torch.Tensor, list[torch.Tensor]]:
        loss = summed_loss(FullPass(lm=lm, examples=ROWS), SupervisedObjective(), range(len(ROWS)))
        parameters = list(trainable.parameters().values())
        return loss.detach(), list(torch.autograd.grad(loss, parameters))

    filled, gradients = computed()
    monkeypatch.setattr(forward_pass, "fill", lambda device, tokens: tokens)
    plain, expected = computed()
    assert lengths == [64, 63]
    torch.testing.assert_close(filled, plain, rtol=1e-6, atol=0)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7)
