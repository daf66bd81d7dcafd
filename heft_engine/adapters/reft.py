"""The interventions of ReFT (arXiv 2404.03592), by pyreft's names: small learned edits of a hidden state.

    loreft     Φ(h) = h + Rᵀ(Wh + b − Rh)         (eq. 5)
    direft     Φ(h) = h + Rᵀ(Wh + b)              (section 3.2: without the difference; pyreft ties R to be a rotation)
    consreft   Φ(h) = h + Rᵀ(b − Rh)
    lobireft   Φ(h) = h + Rᵀb
    noreft     Φ(h) = h + W₂ᵀ(W₁h + b − W₂h)      (not orthonormal)
    nodireft   Φ(h) = h + W₂ᵀ(W₁h + b)

R has orthonormal rows; arithmetic and names of parameters follow pyreft, whose `rotate_layer` holds Rᵀ: shape
(hidden, rank), orthonormal columns. Which classes there are is fixed here: no file names one to be imported.

It does NOT know where an intervention sits, nor training.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from heft_engine.config.train import InterventionKind
from heft_engine.errors import TrainingError

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


class Intervention(nn.Module):
    """Φ(h) = h + Pᵀ(source(h) − Ph). Parameters, state and arithmetic are float32 whatever the model's dtype."""

    kind: ClassVar[InterventionKind]
    rotated: ClassVar[bool] = True  #: P is R; otherwise W₂, any matrix
    reads: ClassVar[bool] = True  #: source(h) = Wh + b; otherwise b
    subtracts: ClassVar[bool] = True  #: Ph is taken away

    def __init__(self, hidden_size: int, rank: int, dropout: float = 0.0, *, trainable: bool = True) -> None:
        """A fresh one, trainable; or, for serving, a frozen one whose R is a plain matrix from the start: the
        parametrisation decomposes a (hidden, hidden) matrix, seconds at 4,096."""
        super().__init__()
        if rank > hidden_size:
            raise ValueError(f"rank {rank} is more than the hidden size {hidden_size}")
        if self.rotated:
            self.rotate_layer = _Rotation(hidden_size, rank)
        else:
            self.proj_layer = nn.Linear(hidden_size, rank, bias=False)
        self.learned_source = nn.Linear(hidden_size, rank) if self.reads else nn.Parameter(torch.rand(rank))
        self.dropout = nn.Dropout(dropout)
        if trainable:
            self.unfreeze()
        else:
            self.freeze()

    @property
    def rotation(self) -> Tensor:
        """Pᵀ, (hidden, rank): Rᵀ, or W₂ᵀ. R is computed anew at every access while it is trained."""
        return cast(Tensor, self.rotate_layer.weight) if self.rotated else self.proj_layer.weight.T

    @property
    def bias(self) -> nn.Parameter:
        source = self.learned_source
        return source.bias if isinstance(source, nn.Linear) else source

    @property
    def rank(self) -> int:
        return self.bias.shape[0]

    def forward(self, hidden: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """h (…, hidden) in any float dtype → h + scale·(Φ(h) − h), in the same dtype.

        `scale` may be a tensor (…, 1) of one for each h.
        """
        h = hidden.float()
        edit = self._edit(h)
        if not isinstance(scale, Tensor) and scale == 1.0:
            return cast(Tensor, self.dropout(h + edit)).to(hidden.dtype)
        return (h + scale * edit).to(hidden.dtype)

    def _edit(self, h: Tensor) -> Tensor:
        """Φ(h) − h."""
        rotation = self.rotation
        source = self.learned_source
        # As linear layers, so that scoring cuts these products into its fixed shapes too.
        change = source(h) if isinstance(source, nn.Linear) else source.expand(*h.shape[:-1], -1)
        if self.subtracts:
            change = change - F.linear(h, rotation.T)
        return F.linear(change, rotation)

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(may decay, must not). R must not: its raw parameter keeps ±1 on the diagonal, and any decay zeroes R."""
        named = dict(self.named_parameters())
        plain = [one for name, one in named.items() if one is self.bias or name.startswith("rotate_layer.")]
        return [one for one in named.values() if not any(one is other for other in plain)], plain

    def freeze(self) -> None:
        """Turns R into the plain matrix it is, as a bundle keeps it: served and evaluated R have the same bits."""
        if self.rotated and is_parametrized(self.rotate_layer):
            remove_parametrizations(self.rotate_layer, "weight", leave_parametrized=True)
        self.requires_grad_(False)

    def unfreeze(self) -> None:
        """Makes the intervention trainable, from where it stands."""
        if self.rotated and not is_parametrized(self.rotate_layer):
            # Sets the raw parameter and `base` together. pyreft's own load writes R into `base` alone, which trains
            # to a matrix that is no rotation (‖RRᵀ − I‖ = 0.37, seen).
            orthogonal(self.rotate_layer)
        self.requires_grad_(True)

    def raw_state(self) -> dict[str, Tensor]:
        """What training continues from, bit for bit: the raw parameter and the parametrisation's base, not R itself."""
        return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}

    @classmethod
    def shapes(cls, hidden_size: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Of the matrices that are kept, by name."""
        projection = (
            {"rotate_layer": (hidden_size, rank)} if cls.rotated else {"proj_layer": (rank, hidden_size)}
        )
        source = {"weight": (rank, hidden_size)} if cls.reads else {}
        return {**projection, **source, "bias": (rank,)}

    def export_state(self) -> dict[str, Tensor]:
        """What is kept for ever: R as one plain matrix, under pyreft's names."""
        return {name: tensor.detach().clone().contiguous() for name, tensor in self._kept().items()}

    def _kept(self) -> dict[str, Tensor]:
        projection = (
            {"rotate_layer": self.rotation} if self.rotated else {"proj_layer": self.proj_layer.weight}
        )
        source = self.learned_source
        return {
            **projection,
            **({"weight": source.weight} if isinstance(source, nn.Linear) else {}),
            "bias": self.bias,
        }

    def load_exported_state(self, state: dict[str, Tensor]) -> None:
        """Sets all matrices from `export_state` (or a pyreft file) and freezes them; `unfreeze` makes them trainable.

        Raises TrainingError when the stored R is no rotation.
        """
        self.freeze()
        with torch.no_grad():
            for name, tensor in self._kept().items():
                tensor.copy_(state[name])
        self.check()

    def check(self) -> None:
        """Raises TrainingError (code rotation_collapsed) when R has lost its orthonormal rows."""
        error = rotation_error(self) if self.rotated else 0.0
        if not error <= MAX_ROTATION_ERROR:
            message = (
                f"the intervention's rotation R collapsed (‖RRᵀ − I‖ = {error:.2g}): it would do nothing. "
                "R must not meet weight decay; lower the learning rate if it diverged"
            )
            raise TrainingError(message, code="rotation_collapsed")


def rotation_error(intervention: Intervention) -> float:
    """‖RRᵀ − I‖, Frobenius."""
    rotation = intervention.rotation.detach()
    eye = torch.eye(rotation.shape[1], dtype=rotation.dtype, device=rotation.device)
    return float(torch.linalg.matrix_norm(rotation.T @ rotation - eye))


class LoreftIntervention(Intervention):
    kind = "loreft"


class DireftIntervention(Intervention):
    kind = "direft"
    subtracts = False


class ConsreftIntervention(Intervention):
    kind = "consreft"
    reads = False


class LobireftIntervention(Intervention):
    kind = "lobireft"
    reads = False
    subtracts = False


class NoreftIntervention(Intervention):
    kind = "noreft"
    rotated = False


class NodireftIntervention(Intervention):
    kind = "nodireft"
    rotated = False
    subtracts = False


KINDS: dict[str, type[Intervention]] = {
    one.kind: one
    for one in (
        LoreftIntervention,
        DireftIntervention,
        ConsreftIntervention,
        LobireftIntervention,
        NoreftIntervention,
        NodireftIntervention,
    )
}


def hidden_size_of(state: dict[str, Tensor]) -> int:
    """Of the hidden states that a baked state is for."""
    return state["rotate_layer"].shape[0] if "rotate_layer" in state else state["proj_layer"].shape[1]
