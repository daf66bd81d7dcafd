"""The part `agreement`: tiny models of every family compute on the device what they compute on the CPU in float32."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heft_engine.adapters.adapter import Adapter
from heft_engine.adapters.registry import attach
from heft_engine.config.train import LoraStage, ReftStage, Stage
from heft_engine.data.encoding import Example
from heft_engine.gpu_check.part import Findings, Target
from heft_engine.gpu_check.shapes import random_examples, random_model, tiny_config
from heft_engine.inference.greedy import generate
from heft_engine.inference.scoring import score
from heft_engine.model.families import FAMILIES
from heft_engine.model.loss import supervised_loss
from heft_engine.model.packed_lm import PackedLM

_CPU = torch.device("cpu")
#: Largest differences from the CPU in float32, relative to the size of what is compared.
_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.2}
_NEW_TOKENS = 12


@dataclass(frozen=True, kw_only=True)
class _Results:
    """Results of one model. gradients: of each stage, in one vector."""

    losses: list[float]
    gradients: list[Tensor]
    scores: Tensor
    texts: list[list[int]]


def check_agreement(target: Target, findings: Findings) -> None:
    dtypes = list(_LIMITS)
    for family in FAMILIES:
        base = random_model(tiny_config(family), _CPU, torch.float32)
        expected = _results(base, _CPU, torch.float32)
        figures: dict[str, dict[str, float]] = {}
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            differences = _differences(_results(base, target.device, dtype), expected)
            figures[name] = {key: float(f"{value:.2g}") for key, value in differences.items()}
            for key, difference in differences.items():
                limit = _LIMITS[dtype]
                is_compared = (
                    key != "tokens" or dtype == torch.float32
                )  # close calls may fall otherwise in bfloat16
                findings.check(
                    difference <= limit or not is_compared,
                    f"{family} in {name}: {key} differ by {difference:.2g} from the CPU's; the limit is {limit}",
                )
        findings.figures[family] = figures


def _results(base: PackedLM, device: torch.device, dtype: torch.dtype) -> _Results:
    """Computes everything with a copy of the base on a device."""
    examples = random_examples((5, 23, 40), base.config.vocab_size)
    lm = PackedLM(copy.deepcopy(base.model).to(device=device, dtype=dtype))
    scores = torch.tensor([list(scores.totals) for scores in score(lm, examples)])
    texts = generate(lm, examples, eos_tokens=(), max_new_tokens=[_NEW_TOKENS] * len(examples))
    losses, gradients = [], []
    for stage in _stages(base):
        fresh = PackedLM(copy.deepcopy(base.model).to(device=device, dtype=dtype))
        loss, gradient = _loss_and_gradient(fresh, stage, [example.supervised() for example in examples])
        losses.append(loss)
        gradients.append(gradient)
    return _Results(losses=losses, gradients=gradients, scores=scores, texts=texts)


def _stages(lm: PackedLM) -> list[Stage]:
    return [
        LoraStage(rank=4, target_modules=list(lm.family.attention)),
        ReftStage(rank=2, layers=[0], positions="f2+l2"),
    ]


def _loss_and_gradient(lm: PackedLM, stage: Stage, examples: Sequence[Example]) -> tuple[float, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = attach(lm, stage)
    _set_parameters(adapter)
    loss, count = supervised_loss(lm, examples)
    (loss / count).backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad.flatten().float().cpu() for p in adapter.parameters().values() if p.grad is not None]
    return float(loss.detach()) / count, torch.cat(gradients)


@torch.no_grad()
def _set_parameters(adapter: Adapter) -> None:
    """Gives every device the same parameters: each draws random numbers of its own."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(adapter.parameters().items()):
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2 and "rotate" in name:
            values = torch.linalg.qr(values)[0] if values.shape[0] >= values.shape[1] else values
        parameter.copy_(0.1 * values)


def _differences(results: _Results, expected: _Results) -> dict[str, float]:
    """Returns relative differences; of texts, the share of tokens that differ."""
    losses = [abs(a - b) / abs(b) for a, b in zip(results.losses, expected.losses, strict=True)]
    gradients = [
        float((a - b).norm() / b.norm()) for a, b in zip(results.gradients, expected.gradients, strict=True)
    ]
    pairs = [
        (a, b)
        for text, other in zip(results.texts, expected.texts, strict=True)
        for a, b in zip(text, other, strict=True)
    ]
    return {
        "losses": max(losses),
        "gradients": max(gradients),
        "scores": float((results.scores - expected.scores).abs().max() / expected.scores.abs().max()),
        "tokens": sum(a != b for a, b in pairs) / len(pairs),
    }
