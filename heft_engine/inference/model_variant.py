"""A model as one request runs it: shared or merged layers, and what one fine-tuned model adds to them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.layout import RowAdapter
from heft_engine.model.packed_lm import PackedLM


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelVariant:
    """A packed model and one fine-tuned model's additions to it.

    adapter: the unmerged adapter, where the layers are shared with other models.
    interventions: the model's interventions, merged or not: they limit which prefixes can be reused.
    scope: identifies the weights in the prefix cache; None keeps nothing there.
    """

    lm: PackedLM
    adapter: RowAdapter | None = None
    interventions: tuple[PlacedIntervention, ...] = ()
    scope: Hashable = None

    @classmethod
    def of_merged(cls, lm: PackedLM, scope: Hashable = None) -> ModelVariant:
        """Returns a merged model with the interventions placed on it."""
        return cls(lm=lm, interventions=tuple(lm.interventions), scope=scope)
