"""Where interventions sit: at the output of a decoder layer, at some prompt tokens.

It does NOT know their kinds (heft_engine.adapters.reft), packing beyond a layout's positions, nor training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heft_engine.adapters.reft import Intervention
from heft_engine.config.train import parse_positions
from heft_engine.model.packing import Layout


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedIntervention:
    """One intervention at the output of one decoder layer (0-based), at the prompt tokens of `positions`."""

    layer: int
    positions: str
    intervention: Intervention

    def apply(self, hidden: Tensor, layout: Layout) -> Tensor:
        """hidden (1, T, hidden) → the same with the intervened tokens edited."""
        by_row = layout.intervened_by_row(*parse_positions(self.positions))
        scales = layout.scales or (layout.scale,) * len(by_row)
        scale_at = {index: s for indices, s in zip(by_row, scales, strict=True) if s for index in indices}
        if not scale_at:
            return hidden
        at = torch.tensor(list(scale_at), device=hidden.device)
        self.intervention.to(hidden.device)
        edited = self.intervention(hidden[0, at], _scale(list(scale_at.values()), hidden.device))
        return hidden.index_copy(1, at, edited[None])

    def same_place(self, other: PlacedIntervention) -> bool:
        """Whether a later stage goes on with this intervention instead of adding one."""
        mine = (self.layer, self.positions, self.intervention.kind, self.intervention.rank)
        return mine == (other.layer, other.positions, other.intervention.kind, other.intervention.rank)


def _scale(scales: list[float], device: torch.device) -> float | Tensor:
    """One number where they are all alike, else (n, 1)."""
    if len(set(scales)) == 1:
        return scales[0]
    return torch.tensor(scales, device=device)[:, None]


class Interventions:
    """The interventions of one model, in the order in which they were added, hooked onto its decoder layers."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self._layers = layers
        self._interventions: list[PlacedIntervention] = []
        self._handles: list[Any] = []
        self._disabled: tuple[PlacedIntervention, ...] = ()

    def __iter__(self) -> Iterator[PlacedIntervention]:
        return iter(self._interventions)

    def add(self, placed: PlacedIntervention) -> None:
        """Hooks a site in. It acts only where a layout names the prompt tokens: in prefill, not in decoding."""

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            layout = kwargs.get("layout")
            return output if layout is None or placed in self._disabled else placed.apply(output, layout)

        self._interventions.append(placed)
        self._handles.append(self._layers[placed.layer].register_forward_hook(hook, with_kwargs=True))

    def extend(self, interventions: Iterable[PlacedIntervention]) -> None:
        for placed in interventions:
            self.add(placed)

    @contextmanager
    def disabled(self, interventions: Iterable[PlacedIntervention] | None = None) -> Iterator[None]:
        """Leaves some interventions out for a while, all by default."""
        before = self._disabled
        self._disabled = tuple(self._interventions if interventions is None else interventions)
        try:
            yield
        finally:
            self._disabled = before

    def clear(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._interventions, self._handles = [], []
