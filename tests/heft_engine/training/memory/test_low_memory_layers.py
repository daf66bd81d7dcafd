"""Layers that save fewer tensors for their gradient compute the same results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_runs import REFT, but
from tiny_models import FAMILIES
from torch import Tensor

from heft_engine.adapters.reft import ReftAdapter
from heft_engine.data.encoding import Example
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.base_models import load_model, resolve_path
from heft_engine.model.packed_lm import PackedLM
from heft_engine.objectives.supervised import SupervisedObjective
from heft_engine.training.forward_pass import FullPass, summed_loss
from heft_engine.training.memory import memory_plan
from heft_engine.training.memory.low_memory_layers import low_memory_layers

MakeModel = Callable[[str], Path]
ROWS = [Example(prompt=(7, 8, 9) * n, answers=((5, n),), labels=("",), gold=0) for n in (1, 7, 20)]


def packed(path: Path, dtype: torch.dtype) -> PackedLM:
    return PackedLM(load_model(resolve_path(path), dtype=dtype, attention=IMPLEMENTATION))


def loss_and_gradients(lm: PackedLM, trainable: ReftAdapter) -> tuple[Tensor, list[Tensor]]:
    loss = summed_loss(FullPass(lm=lm, examples=ROWS), SupervisedObjective(), range(len(ROWS)))
    loss.backward()  # type: ignore[no-untyped-call]
    parameters = trainable.parameters().values()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    return loss.detach(), gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_low_memory_layers_are_the_layers(make_tiny_model: MakeModel, family: str) -> None:
    lm = packed(make_tiny_model(family), torch.float32)
    torch.manual_seed(0)
    trainable = ReftAdapter.attach(lm, but(REFT, layers=[0], positions="l1"))
    before = {name: module.forward for name, module in lm.layers.named_modules()}
    loss, gradients = loss_and_gradients(lm, trainable)
    with low_memory_layers(lm):
        lean_loss, lean_gradients = loss_and_gradients(lm, trainable)
        changed = [name for name, module in lm.layers.named_modules() if "forward" in vars(module)]
    assert (changed == []) == (family == "gpt_neox"), "norms and gated activations of all others"
    assert torch.equal(lean_loss, loss), "to the bit"
    assert gradients
    for lean, plain in zip(lean_gradients, gradients, strict=True):
        torch.testing.assert_close(lean, plain, rtol=1e-4, atol=1e-6)
    assert {name: module.forward for name, module in lm.layers.named_modules()} == before


def test_bfloat16_has_the_same_bits_forward(tiny_llama_dir: Path) -> None:
    lm = packed(tiny_llama_dir, torch.bfloat16)
    trainable = ReftAdapter.attach(lm, but(REFT, layers=[0]))
    loss, gradients = loss_and_gradients(lm, trainable)
    with low_memory_layers(lm):
        lean_loss, lean_gradients = loss_and_gradients(lm, trainable)
    assert torch.equal(lean_loss, loss)
    for lean, plain in zip(lean_gradients, gradients, strict=True):
        torch.testing.assert_close(lean, plain, rtol=0.1, atol=0.05 * float(plain.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_low_memory_layers_keep_less(make_tiny_model: MakeModel, family: str) -> None:
    """Even a tiny model with narrow layers takes 15 % less memory per token."""
    lm = packed(make_tiny_model(family), torch.bfloat16)
    ReftAdapter.attach(lm, but(REFT, layers=[0]))
    usual = memory_plan.footprint(lm)
    with low_memory_layers(lm):
        lean = memory_plan.footprint(lm)
    assert lean.per_token < 0.85 * usual.per_token
