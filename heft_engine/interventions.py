"""LoReFT, and where it sits: a small learned edit of one layer's hidden state at some prompt tokens.

Φ(h) = h + Rᵀ(Wh + b − Rh), R with orthonormal rows (arXiv 2404.03592, eq. 5). Arithmetic and names follow pyreft, whose
`rotate_layer` holds Rᵀ: shape (hidden, rank), orthonormal columns.

It does NOT know packing beyond a layout's positions, nor training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from heft_engine.config import parse_positions
from heft_engine.errors import TrainingError
from heft_engine.packing import Layout

#: ‖RRᵀ − I‖ above this means that R is no rotation any more. Householder products stay below 1e-5 in float32.
MAX_ROTATION_ERROR = 1e-3


class _Rotation(nn.Module):
    """x ↦ x·weight; `weight` (hidden, rank) has orthonormal columns once parametrised."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, rank))
        nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class LoreftIntervention(nn.Module):
    """Φ of LoReFT. Parameters, state and arithmetic are float32 whatever the model's dtype."""

    kind = "loreft"

    def __init__(self, hidden_size: int, rank: int, dropout: float = 0.0, *, trainable: bool = True) -> None:
        """A fresh one, trainable; or, for serving, a frozen one whose R is a plain matrix from the start: the
        parametrisation decomposes a (hidden, hidden) matrix, seconds at 4,096."""
        super().__init__()
        if rank > hidden_size:
            raise ValueError(f"rank {rank} is more than the hidden size {hidden_size}")
        self.rotate_layer = _Rotation(hidden_size, rank)
        self.learned_source = nn.Linear(hidden_size, rank)
        self.dropout = nn.Dropout(dropout)
        if trainable:
            self.thaw()
        else:
            self.freeze()

    @property
    def rotation(self) -> Tensor:
        """Rᵀ, (hidden, rank). Computed anew at every access while it is trained."""
        return cast(Tensor, self.rotate_layer.weight)

    @property
    def bias(self) -> nn.Parameter:
        return self.learned_source.bias

    def forward(self, hidden: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """h (…, hidden) in any float dtype → h + scale·(Φ(h) − h), in the same dtype.

        `scale` may be a tensor (…, 1) of one for each h.
        """
        h = hidden.float()
        rotation = self.rotation
        # As linear layers, so that scoring cuts these products into its fixed shapes too.
        edit = F.linear(self.learned_source(h) - F.linear(h, rotation.T), rotation)
        if not isinstance(scale, Tensor) and scale == 1.0:
            return cast(Tensor, self.dropout(h + edit)).to(hidden.dtype)
        return (h + scale * edit).to(hidden.dtype)

    @property
    def rank(self) -> int:
        return self.learned_source.out_features

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(may decay, must not). R must not: its raw parameter keeps ±1 on the diagonal, and any decay zeroes R."""
        rotation = list(self.rotate_layer.parameters())
        return [cast(nn.Parameter, self.learned_source.weight)], [self.bias, *rotation]

    def freeze(self) -> None:
        """Turns R into the plain matrix it is, as a bundle keeps it: served and evaluated R have the same bits."""
        if is_parametrized(self.rotate_layer):
            remove_parametrizations(self.rotate_layer, "weight", leave_parametrized=True)
        self.requires_grad_(False)

    def thaw(self) -> None:
        """Makes the intervention trainable, from where it stands."""
        if not is_parametrized(self.rotate_layer):
            # Sets the raw parameter and `base` together. pyreft's own load writes R into `base` alone, which trains
            # to a matrix that is no rotation (‖RRᵀ − I‖ = 0.37, seen).
            orthogonal(self.rotate_layer)
        self.requires_grad_(True)

    def raw_state(self) -> dict[str, Tensor]:
        """What training continues from, bit for bit: the raw parameter and the parametrisation's base, not R itself."""
        return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}

    def baked_state(self) -> dict[str, Tensor]:
        """What is kept for ever: R as one plain matrix, under pyreft's names."""
        return {
            "rotate_layer": self.rotation.detach().clone().contiguous(),
            "weight": self.learned_source.weight.detach().clone(),
            "bias": self.bias.detach().clone(),
        }

    def load_baked(self, state: dict[str, Tensor]) -> None:
        """Sets R, W and b from `baked_state` (or a pyreft file) and freezes them; `thaw` makes them trainable.

        Raises TrainingError when the stored R is no rotation.
        """
        self.freeze()
        with torch.no_grad():
            self.learned_source.weight.copy_(state["weight"])
            self.bias.copy_(state["bias"])
            self.rotation.copy_(state["rotate_layer"])
        check_rotation(self)


def rotation_error(intervention: LoreftIntervention) -> float:
    """‖RRᵀ − I‖, Frobenius."""
    rotation = intervention.rotation.detach()
    eye = torch.eye(rotation.shape[1], dtype=rotation.dtype, device=rotation.device)
    return float(torch.linalg.matrix_norm(rotation.T @ rotation - eye))


def check_rotation(intervention: LoreftIntervention) -> None:
    """Raises TrainingError (code rotation_collapsed) when R has lost its orthonormal rows."""
    error = rotation_error(intervention)
    if not error <= MAX_ROTATION_ERROR:
        message = (
            f"the intervention's rotation R collapsed (‖RRᵀ − I‖ = {error:.2g}): it would do nothing. "
            "R must not meet weight decay; lower the learning rate if it diverged"
        )
        raise TrainingError(message, code="rotation_collapsed")


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """One intervention at the output of one decoder layer (0-based), at the prompt tokens of `positions`."""

    layer: int
    positions: str
    intervention: LoreftIntervention

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

    def same_place(self, other: Site) -> bool:
        """Whether a later stage goes on with this intervention instead of adding one."""
        mine = (self.layer, self.positions, self.intervention.kind, self.intervention.rank)
        return mine == (other.layer, other.positions, other.intervention.kind, other.intervention.rank)


def _scale(scales: list[float], device: torch.device) -> float | Tensor:
    """One number where they are all alike, else (n, 1)."""
    if len(set(scales)) == 1:
        return scales[0]
    return torch.tensor(scales, device=device)[:, None]


class Sites:
    """The interventions of one model, in the order in which they were added, hooked onto its decoder layers."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self._layers = layers
        self._sites: list[Site] = []
        self._handles: list[Any] = []
        self._muted: tuple[Site, ...] = ()

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def add(self, site: Site) -> None:
        """Hooks a site in. It acts only where a layout names the prompt tokens: in prefill, not in decoding."""

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            layout = kwargs.get("layout")
            return output if layout is None or site in self._muted else site.apply(output, layout)

        self._sites.append(site)
        self._handles.append(self._layers[site.layer].register_forward_hook(hook, with_kwargs=True))

    def extend(self, sites: Iterable[Site]) -> None:
        for site in sites:
            self.add(site)

    @contextmanager
    def muted(self, sites: Iterable[Site] | None = None) -> Iterator[None]:
        """Leaves some interventions out for a while, all by default."""
        before = self._muted
        self._muted = tuple(self._sites if sites is None else sites)
        try:
            yield
        finally:
            self._muted = before

    def clear(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._sites, self._handles = [], []
