"""Random fine-tuned models of one base: LoRA adapters of many ranks, some with DoRA, and interventions."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from heft_engine.adapters.lora.variants import row_norms
from heft_engine.adapters.lora.weights import LoraWeights, weight_of
from heft_engine.adapters.reft import KINDS
from heft_engine.bundle.format import StoredIntervention
from heft_engine.config.train import InterventionKind
from heft_engine.data.encoding import Example
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.model.packed_lm import PackedLM
from heft_engine.serving.row_adapters import UnmergedModel
from heft_engine.serving.shared_copy import copy_sharing_weights


@dataclass(frozen=True)
class StoredWeights:
    adapters: list[LoraWeights]
    interventions: list[StoredIntervention]


def adapter(
    lm: PackedLM, rank: int, seed: int, *, dora: bool = False, suffixes: tuple[str, ...]
) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)
    names = [name for name, _ in lm.model.named_modules() if name.endswith(suffixes)]
    factors, magnitudes = {}, {}
    for name in names:
        weight = weight_of(lm.model, name)
        down = torch.randn(rank, weight.shape[1], generator=generator) * 0.1
        up = torch.randn(weight.shape[0], rank, generator=generator) * 0.1
        factors[name] = (down, up)
        norms = row_norms(weight.float())
        magnitudes[name] = norms * (1 + 0.2 * torch.rand(norms.shape, generator=generator))
    return LoraWeights(
        factors=factors,
        scaling=2.0,
        rank=rank,
        alpha=2.0 * rank,
        target_modules=list(suffixes),
        layers=None,
        magnitudes=magnitudes if dora else None,
    )


def stored_intervention(
    lm: PackedLM, layer: int, positions: str, seed: int, kind: InterventionKind = "loreft", rank: int = 2
) -> StoredIntervention:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        intervention = KINDS[kind](lm.hidden_size, rank)
        with torch.no_grad():
            for name, parameter in intervention.named_parameters():
                if "rotate" not in name:  # a changed rotation would not be orthogonal
                    parameter.add_(torch.randn_like(parameter))
        state: dict[str, Tensor] = intervention.export_state()
    return StoredIntervention(layer=layer, positions=positions, rank=rank, state=state, kind=kind)


def models(lm: PackedLM, *, suffixes: tuple[str, ...], biased: bool = False) -> list[StoredWeights]:
    """Models of mixed ranks: two LoRA stages, DoRA first and last, no adapter, and zero to two interventions."""

    def lo(rank: int, seed: int, *, dora: bool = False) -> LoraWeights:
        return adapter(lm, rank, seed, dora=dora, suffixes=suffixes)

    return [
        StoredWeights([lo(2, 1)], [stored_intervention(lm, 1, "l1", 11)]),
        StoredWeights(
            [lo(4, 2), lo(1, 3)],
            [stored_intervention(lm, 2, "f1+l2", 12), stored_intervention(lm, 0, "l1", 13, "noreft")],
        ),
        StoredWeights([lo(3, 4, dora=True)], []),
        StoredWeights(
            [lo(2, 5, dora=True), lo(2, 6), lo(2, 7, dora=True)],
            [stored_intervention(lm, 3, "l1", 14, "direft")],
        ),
        StoredWeights([], [stored_intervention(lm, 1, "l3", 15)]),
        StoredWeights([lo(1, 8)], [stored_intervention(lm, 1, "f2", 16)]),
    ]


def merged(lm: PackedLM, weights: StoredWeights) -> ModelVariant:
    """The model merged into a copy of the base."""
    touched = {module for lora in weights.adapters for module in lora.factors}
    copy = PackedLM(copy_sharing_weights(lm.model, touched))
    for lora in weights.adapters:
        lora.merge_into(copy.model)
    for stored in weights.interventions:
        copy.interventions.add(stored.restore(copy.hidden_size))
    return ModelVariant(lm=copy, interventions=tuple(copy.interventions), scope="merged")


def unmerged(lm: PackedLM, weights: StoredWeights, scope: str = "shared") -> ModelVariant:
    """The model as adapters and interventions on `lm`, whose layers apply them row by row."""
    added = UnmergedModel(lm, weights.adapters, weights.interventions)
    return ModelVariant(lm=lm, adapter=added, interventions=tuple(added.interventions), scope=scope)


def examples(n: int, seed: int = 0, *, prefix: tuple[int, ...] = (), longest: int = 60) -> list[Example]:
    """Examples with single-token answers, and every third one with longer answers that branch."""
    rng = random.Random(f"examples/{seed}")
    rows = []
    for index in range(n):
        prompt = (*prefix, *(rng.randrange(5, 600) for _ in range(rng.randint(4, longest))))
        answers: tuple[tuple[int, ...], ...] = ((7,), (9,))
        if index % 3 == 2:
            answers = ((7, 9, 11), (12,), (9, 8))
        labels = tuple(str(answer) for answer in answers)
        rows.append(Example(prompt=prompt, answers=answers, labels=labels, gold=None))
    return rows
