"""Synthetic fine-tuned models with real shapes and random values, which do not affect the cost of serving."""

from __future__ import annotations

import torch

from heft_engine.adapters.lora.weights import LoraWeights
from heft_engine.adapters.reft import KINDS
from heft_engine.bundle.format import StoredIntervention
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.packed_lm import PackedLM
from heft_engine.serving.row_adapters import UnmergedModel
from heft_engine.serving.shared_copy import copy_sharing_weights

LAYER, RANK, LORA_RANK = 15, 4, 8


def adapter(lm: PackedLM, seed: int) -> LoraWeights:
    """LoRA of rank 8 on the query and value projections, small enough to leave the model usable."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in lm.model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            rows, columns = module.weight.shape
            down = torch.randn(LORA_RANK, columns, generator=generator) / columns**0.5
            factors[name] = (down, torch.randn(rows, LORA_RANK, generator=generator) * 0.02)
    return LoraWeights(
        factors=factors,
        scaling=4.0,
        rank=LORA_RANK,
        alpha=32.0,
        target_modules=["q_proj", "v_proj"],
        layers=None,
    )


def stored_intervention(lm: PackedLM, seed: int) -> StoredIntervention:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        intervention = KINDS["loreft"](lm.hidden_size, RANK, trainable=False)
    return StoredIntervention(layer=LAYER, positions="l1", rank=RANK, state=intervention.export_state())


def merged(lm: PackedLM, seed: int) -> ModelVariant:
    """Returns a model merged into a copy of the base, as the service keeps frequently used models."""
    lora = adapter(lm, seed)
    copy = PackedLM(copy_sharing_weights(lm.model, set(lora.factors)))
    lora.merge_into(copy.model)
    copy.pack()
    placed: PlacedIntervention = stored_intervention(lm, seed).restore(lm.hidden_size)
    copy.interventions.add(placed)
    return ModelVariant(lm=copy, interventions=(placed,), scope=("merged", seed))


def unmerged(lm: PackedLM, seed: int) -> ModelVariant:
    """Returns a model on the shared base."""
    added = UnmergedModel(lm, [adapter(lm, seed)], [stored_intervention(lm, seed)])
    return ModelVariant(
        lm=lm, adapter=added, interventions=tuple(added.interventions), scope=("shared", seed)
    )
