"""Losses and gradients: packed passes against transformers' forward, every cache level against the whole model."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import REFT, but
from tiny_models import FAMILIES
from torch import Tensor
from transformers import AutoModelForCausalLM

from heft_engine.adapters.lora.adapter import LoraAdapter
from heft_engine.adapters.reft import LoreftIntervention, ReftAdapter
from heft_engine.config.flops import CacheLevel
from heft_engine.config.train import LoraStage
from heft_engine.data.encoding import Example
from heft_engine.model import attention
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.base_models import load_model, resolve_path
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.packed_lm import PackedLM
from heft_engine.objectives.supervised import SupervisedObjective
from heft_engine.training.forward_pass import ForwardPass, FullPass, summed_loss
from heft_engine.training.memory.cache_plan import CacheBudget, CachePlace, CachePlan, plan_cache

MakeModel = Callable[[str], Path]


def packed(path: Path) -> PackedLM:
    return PackedLM(load_model(resolve_path(path), dtype=torch.float32, attention=IMPLEMENTATION))


def rows() -> list[Example]:
    """Prompts shorter and longer than the window of 16, answers of one and of several tokens."""
    chance = random.Random(0)
    examples = []
    for prompt, answer in ((1, 2), (2, 1), (5, 3), (17, 1), (40, 1), (50, 20)):
        ids = [chance.randrange(5, 600) for _ in range(prompt + answer)]
        examples.append(
            Example(prompt=tuple(ids[:prompt]), answers=(tuple(ids[prompt:]),), labels=("",), gold=0)
        )
    return examples


@pytest.mark.parametrize("longest", [0, 1_024], ids=["torch's gradient", "our gradient"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_familys_own_forward(
    make_tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch, family: str, longest: int
) -> None:
    """Compares every weight's gradient, through both implementations of attention."""
    monkeypatch.setattr(attention, "LONGEST_MATRIX", longest)
    path = make_tiny_model(family)
    lm = packed(path)
    lm.model.requires_grad_(True)
    loss = summed_loss(FullPass(lm=lm, examples=rows()), SupervisedObjective(), range(6))
    loss.backward()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    total = 0.0
    for row in rows():
        ids = torch.tensor([[*row.prompt, *row.answers[0]]])
        labels = torch.tensor([[-100] * len(row.prompt) + list(row.answers[0])])
        reference_loss = model(ids, labels=labels).loss * len(row.answers[0])
        reference_loss.backward()
        total += float(reference_loss.detach())
    assert float(loss.detach()) == pytest.approx(total, abs=1e-3)
    theirs = dict(model.named_parameters())
    for name, parameter in lm.model.named_parameters():
        if theirs[name].grad is not None:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=2e-4, rtol=1e-3, msg=name)


def standing(lm: PackedLM, layer: int, positions: str, seed: int) -> None:
    """Adds a frozen intervention, as an earlier stage leaves it."""
    torch.manual_seed(seed)
    intervention = LoreftIntervention(lm.hidden_size, 3)
    torch.nn.init.normal_(intervention.bias)
    intervention.freeze()
    lm.interventions.add(
        PlacedIntervention(layer=layer, positions=positions, intervention=intervention.eval())
    )


def computed(forward: ForwardPass, trainable: ReftAdapter | LoraAdapter) -> tuple[float, dict[str, Tensor]]:
    """Returns the loss of all rows, in a shuffled order, and its gradients."""
    for parameter in trainable.parameters().values():
        parameter.grad = None
    loss = summed_loss(forward, SupervisedObjective(), [4, 0, 5, 1, 3, 2])
    loss.backward()  # type: ignore[no-untyped-call]
    grads = {name: p.grad.clone() for name, p in trainable.parameters().items() if p.grad is not None}
    assert grads
    assert any(bool(grad.abs().max() > 1e-3) for grad in grads.values())
    return float(loss.detach()), grads


def assert_same(actual: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in actual[1].items():
        torch.testing.assert_close(gradient, expected[1][name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["l1", "f1+l2"])
def test_a_reft_stage_on_every_cache_level(
    make_tiny_model: MakeModel, tmp_path: Path, family: str, positions: str
) -> None:
    """Interventions of two layers are trained, with frozen ones below, at and above them."""
    lm = packed(make_tiny_model(family))
    for seed, (layer, earlier_positions) in enumerate(((0, "l2"), (1, "f1"), (2, "l1"), (3, "f2+l1"))):
        standing(lm, layer, earlier_positions, seed)
    torch.manual_seed(9)
    trainable = ReftAdapter.attach(lm, but(REFT, layers=[1, 3], positions=positions, rank=2))
    trainable.train(False)
    plain = computed(FullPass(lm=lm, examples=rows()), trainable)
    levels = [CacheLevel.HIDDEN_STATES, CacheLevel.KV] if positions == "l1" else [CacheLevel.HIDDEN_STATES]
    ladder = [(level, place) for level in levels for place in CachePlace]
    for level, place in ladder:
        plan = CachePlan(level=level, place=place, bytes=0)
        forward = plan.open(lm, trainable.boundary(), rows(), tmp_path / "cache")
        assert not (tmp_path / "cache").exists(), "nothing is left behind, however the process ends"
        assert_same(computed(forward, trainable), plain)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_lora_on_upper_layers_on_every_cache_level(make_tiny_model: MakeModel, family: str) -> None:
    lm = packed(make_tiny_model(family))
    for seed, layer in enumerate((0, 1, 3)):
        standing(lm, layer, "f1+l1", seed)
    modules = list(lm.family.attention)
    trainable = LoraAdapter.attach(lm, LoraStage(layers=[2, 3], target_modules=modules))
    with torch.no_grad():
        for parameter in trainable.parameters().values():
            parameter.normal_(std=0.1)
    trainable.train(False)
    plain = computed(FullPass(lm=lm, examples=rows()), trainable)
    forward = CachePlan(level=CacheLevel.HIDDEN_STATES, bytes=0).open(lm, trainable.boundary(), rows(), None)
    assert_same(computed(forward, trainable), plain)


def test_the_ladder_is_climbed_as_far_as_the_budget_allows(tiny_llama_dir: Path, tmp_path: Path) -> None:
    lm = packed(tiny_llama_dir)
    last = ReftAdapter.attach(lm, but(REFT, layers=[1])).boundary()
    first = ReftAdapter.attach(lm, but(REFT, layers=[1], positions="f1")).boundary()

    def plan(boundary: Any = last, **budget: Any) -> CachePlan:
        return plan_cache(lm, boundary, rows(), CacheBudget(directory=tmp_path, **budget))

    # 137 tokens are fed in, 109 of them left of a last prompt token; above are two layers of two heads of 8.
    tokens, left = 115 + 1 + 2 + 19, 0 + 1 + 4 + 16 + 39 + 49
    states, keys_values = 4 * 32 * tokens, 4 * (32 * (tokens - left) + 2 * 2 * 16 * left)
    assert plan(memory=10**9) == CachePlan(level=CacheLevel.KV, bytes=keys_values)
    assert plan(memory=keys_values - 1, disk=keys_values).place == CachePlace.DISK
    assert plan(memory=keys_values - 1, disk=keys_values).level == CacheLevel.KV
    assert plan(memory=states, disk=0) == CachePlan(level=CacheLevel.HIDDEN_STATES, bytes=states)
    assert plan(memory=0, disk=states) == CachePlan(
        level=CacheLevel.HIDDEN_STATES, place=CachePlace.DISK, bytes=states
    )
    assert plan(memory=0, disk=0).level == CacheLevel.NONE
    # With a first token intervened, nothing is left of the suffix.
    assert plan(first, memory=10**9) == CachePlan(level=CacheLevel.HIDDEN_STATES, bytes=states)
    assert (
        plan(LoraAdapter.attach(lm, LoraStage(target_modules=["q_proj"])).boundary(), memory=10**9).level
        == "nothing"
    )
