"""Fine-tuned models that nobody trained: real shapes, made-up numbers. What serving costs does not depend on them."""

from __future__ import annotations

import torch

from heft_engine.adapters.lora.weights import LoraWeights
from heft_engine.adapters.reft import KINDS
from heft_engine.bundle.format import StoredIntervention
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.packed_lm import PackedLM
from heft_engine.serving.row_adapters import UnmergedModel
from heft_engine.serving.shared_copy import copy_sharing

LAYER, RANK, LORA_RANK = 15, 4, 8


def adapter(lm: PackedLM, seed: int) -> LoraWeights:
    """LoRA of rank 8 on queries and values, small enough not to break the language."""
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
    """On a copy of the base, as the service holds a hot model."""
    own = adapter(lm, seed)
    twin = PackedLM(copy_sharing(lm.model, set(own.factors)))
    own.merge_into(twin.model)
    twin.pack()
    placed: PlacedIntervention = stored_intervention(lm, seed).restore(lm.hidden_size)
    twin.interventions.add(placed)
    return ModelVariant(lm=twin, interventions=(placed,), scope=("merged", seed))


def unmerged(lm: PackedLM, seed: int) -> ModelVariant:
    """On the shared base."""
    added = UnmergedModel(lm, [adapter(lm, seed)], [stored_intervention(lm, seed)])
    return ModelVariant(
        lm=lm, adapter=added, interventions=tuple(added.interventions), scope=("shared", seed)
    )
