"""Interventions in a model: learned edits of hidden states at the output of decoder layers, at some prompt tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from heft_engine.config.train import InterventionKind, parse_positions
from heft_engine.model.layout import Layout
from heft_engine.runtime.transfers import index_tensor, to_device


class Intervention(Protocol):
    """A module that edits hidden states. heft_engine.adapters.reft has the six kinds of ReFT."""

    @property
    def kind(self) -> InterventionKind: ...
    @property
    def rank(self) -> int: ...
    def __call__(self, hidden: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Returns h + scale·(Φ(h) − h) for h (n, hidden); `scale` is a number, or a tensor (n, 1)."""

    def to(self, device: torch.device) -> Any: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def export_state(self) -> dict[str, Tensor]:
        """Returns the matrices that a bundle stores."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedIntervention:
    """One intervention at the output of one decoder layer (0-based), at the prompt tokens of `positions`."""

    layer: int
    positions: str
    intervention: Intervention

    def apply(self, hidden: Tensor, layout: Layout) -> Tensor:
        """Returns hidden (1, T, hidden) with the intervened tokens edited."""
        by_row = layout.intervened_by_row(*parse_positions(self.positions))
        scales = layout.scales or (layout.scale,) * len(by_row)
        scale_of = {
            token: scale for tokens, scale in zip(by_row, scales, strict=True) if scale for token in tokens
        }
        if not scale_of:
            return hidden
        tokens = index_tensor(list(scale_of), hidden.device)
        device = next(self.intervention.parameters()).device
        if device.type != hidden.device.type:
            self.intervention.to(hidden.device)
            device = hidden.device
        # Of a model on several GPUs the states go to the intervention: it may be training where it is.
        edited = self.intervention(hidden[0, tokens].to(device), _scale(list(scale_of.values()), device))
        return hidden.index_copy(1, tokens, edited.to(hidden.device)[None])

    def same_place(self, other: PlacedIntervention) -> bool:
        """Returns whether a later stage goes on with this intervention instead of adding the other."""
        return self._place() == other._place()

    def _place(self) -> tuple[int, str, str, int]:
        return self.layer, self.positions, self.intervention.kind, self.intervention.rank


def _scale(scales: list[float], device: torch.device) -> float | Tensor:
    """Returns one number where all are alike, else (n, 1)."""
    if len(set(scales)) == 1:
        return scales[0]
    return to_device(torch.tensor(scales), device)[:, None]


class Interventions:
    """A model's interventions, in the order in which they were added, hooked onto its decoder layers."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self._layers = layers
        self._placed: list[PlacedIntervention] = []
        self._handles: list[Any] = []
        self._disabled: tuple[PlacedIntervention, ...] = ()

    def __iter__(self) -> Iterator[PlacedIntervention]:
        return iter(self._placed)

    def add(self, placed: PlacedIntervention) -> None:
        """Hooks an intervention in. It acts where a layout names prompt tokens: in prefill, not in decoding."""

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            layout = kwargs.get("layout")
            return output if layout is None or placed in self._disabled else placed.apply(output, layout)

        self._placed.append(placed)
        self._handles.append(self._layers[placed.layer].register_forward_hook(hook, with_kwargs=True))

    def extend(self, interventions: Iterable[PlacedIntervention]) -> None:
        for placed in interventions:
            self.add(placed)

    @contextmanager
    def disabled(self, interventions: Iterable[PlacedIntervention] | None = None) -> Iterator[None]:
        """Inside, these interventions do nothing; by default all."""
        before = self._disabled
        self._disabled = tuple(self._placed if interventions is None else interventions)
        try:
            yield
        finally:
            self._disabled = before

    def clear(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._placed, self._handles = [], []
