"""ReFT (arXiv 2404.03592): small learned edits of hidden states, by pyreft's names, and the adapter that trains them.

    loreft     Φ(h) = h + Rᵀ(Wh + b − Rh)         (eq. 5)
    direft     Φ(h) = h + Rᵀ(Wh + b)              (section 3.2: without the difference; pyreft ties R to be a rotation)
    consreft   Φ(h) = h + Rᵀ(b − Rh)
    lobireft   Φ(h) = h + Rᵀb
    noreft     Φ(h) = h + W₂ᵀ(W₁h + b − W₂h)      (not orthonormal)
    nodireft   Φ(h) = h + W₂ᵀ(W₁h + b)

R has orthonormal rows; arithmetic and names of parameters follow pyreft, whose `rotate_layer` holds Rᵀ: shape
(hidden, rank), orthonormal columns. Files name a kind, never a class to import.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from heft_engine.adapters.adapter import Adapter, Boundary
from heft_engine.config.train import InterventionKind, ReftStage
from heft_engine.data.encoding import Example
from heft_engine.errors import TrainingError
from heft_engine.model.auto_settings import stage_layers
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.packed_lm import PackedLM

#: ‖RRᵀ − I‖ above this means that R has lost its orthonormal rows. Householder products stay below 1e-5 in float32.
MAX_ROTATION_ERROR = 1e-3


class _Rotation(nn.Module):
    """x ↦ x·weight; `weight` (hidden, rank) has orthonormal columns once parametrised."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, rank))
        nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class ReftIntervention(nn.Module):
    """Φ(h) = h + Pᵀ(source(h) − Ph). Parameters, state and arithmetic are float32 whatever the model's dtype."""

    kind: ClassVar[InterventionKind]
    rotated: ClassVar[bool] = True  #: P is R; otherwise W₂, any matrix
    reads: ClassVar[bool] = True  #: source(h) = Wh + b; otherwise b
    subtracts: ClassVar[bool] = True  #: Ph is subtracted; otherwise Φ(h) = h + Pᵀ·source(h)

    def __init__(self, hidden_size: int, rank: int, dropout: float = 0.0, *, trainable: bool = True) -> None:
        """Initialises the parameters at random. Not trainable: R is a plain matrix from the start, as serving needs it;
        the parametrisation decomposes a (hidden, hidden) matrix, seconds at 4,096.

        Raises ValueError when `rank` is more than `hidden_size`.
        """
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
        """Pᵀ, (hidden, rank): Rᵀ or W₂ᵀ. While R is trained, every access computes it anew."""
        return cast(Tensor, self.rotate_layer.weight) if self.rotated else self.proj_layer.weight.T

    @property
    def bias(self) -> nn.Parameter:
        source = self.learned_source
        return source.bias if isinstance(source, nn.Linear) else source

    @property
    def rank(self) -> int:
        return self.bias.shape[0]

    def forward(self, hidden: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Returns h + scale·(Φ(h) − h) for h (…, hidden) of any float dtype, in that dtype.

        scale: a number, or a tensor (…, 1).
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
        # As linear layers, so that batch-invariant scoring replaces these products too.
        change = source(h) if isinstance(source, nn.Linear) else source.expand(*h.shape[:-1], -1)
        if self.subtracts:
            change = change - F.linear(h, rotation.T)
        return F.linear(change, rotation)

    def no_decay(self) -> set[str]:
        """Returns the names of parameters that weight decay must not touch: b, and the raw parameter of R.

        The latter keeps ±1 on its diagonal; any decay makes R zero.
        """
        names = {name for name, _ in self.named_parameters()}
        return {
            name
            for name in names
            if self.get_parameter(name) is self.bias or name.startswith("rotate_layer.")
        }

    def freeze(self) -> None:
        """Replaces R's parametrisation by the plain matrix that a bundle stores: served R has the same bits."""
        if self.rotated and is_parametrized(self.rotate_layer):
            remove_parametrizations(self.rotate_layer, "weight", leave_parametrized=True)
        self.requires_grad_(False)

    def unfreeze(self) -> None:
        """Makes the intervention trainable, from its present parameters."""
        if self.rotated and not is_parametrized(self.rotate_layer):
            # Sets the raw parameter and `base` together. pyreft's own load writes R into `base` alone, and training
            # then breaks R (‖RRᵀ − I‖ = 0.37, measured).
            orthogonal(self.rotate_layer)
        self.requires_grad_(True)

    def raw_state(self) -> dict[str, Tensor]:
        """Returns a copy of what training continues from: the raw parameter and the parametrisation's base."""
        return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}

    @classmethod
    def shapes(cls, hidden_size: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of `export_state`'s matrices."""
        projection = (
            {"rotate_layer": (hidden_size, rank)} if cls.rotated else {"proj_layer": (rank, hidden_size)}
        )
        source = {"weight": (rank, hidden_size)} if cls.reads else {}
        return {**projection, **source, "bias": (rank,)}

    def export_state(self) -> dict[str, Tensor]:
        """Returns a copy of the matrices under pyreft's names, R as one plain matrix."""
        return {name: tensor.detach().clone().contiguous() for name, tensor in self._matrices().items()}

    def _matrices(self) -> dict[str, Tensor]:
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
        """Sets all matrices from `export_state` (or a pyreft file) and freezes them.

        Raises TrainingError when the rows of the stored R are not orthonormal.
        """
        self.freeze()
        with torch.no_grad():
            for name, tensor in self._matrices().items():
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


def rotation_error(intervention: ReftIntervention) -> float:
    """Returns ‖RRᵀ − I‖ (Frobenius)."""
    rotation = intervention.rotation.detach()
    eye = torch.eye(rotation.shape[1], dtype=rotation.dtype, device=rotation.device)
    return float(torch.linalg.matrix_norm(rotation.T @ rotation - eye))


class LoreftIntervention(ReftIntervention):
    kind = "loreft"


class DireftIntervention(ReftIntervention):
    kind = "direft"
    subtracts = False


class ConsreftIntervention(ReftIntervention):
    kind = "consreft"
    reads = False


class LobireftIntervention(ReftIntervention):
    kind = "lobireft"
    reads = False
    subtracts = False


class NoreftIntervention(ReftIntervention):
    kind = "noreft"
    rotated = False


class NodireftIntervention(ReftIntervention):
    kind = "nodireft"
    rotated = False
    subtracts = False


KINDS: dict[str, type[ReftIntervention]] = {
    intervention.kind: intervention
    for intervention in (
        LoreftIntervention,
        DireftIntervention,
        ConsreftIntervention,
        LobireftIntervention,
        NoreftIntervention,
        NodireftIntervention,
    )
}


def hidden_size_of(state: dict[str, Tensor]) -> int:
    """Returns the size of the hidden states that an exported state is for."""
    return state["rotate_layer"].shape[0] if "rotate_layer" in state else state["proj_layer"].shape[1]


@dataclass(kw_only=True)
class ReftAdapter(Adapter):
    """One intervention for each of the stage's layers. It stays in place when the stage ends.

    A stage goes on with earlier interventions of the same layer, positions, kind and rank, and adds the others; with
    `init: "new"` it adds all.
    """

    placed: list[PlacedIntervention]
    #: All interventions at the lowest trained layer from the first trained one on, in their order.
    at_boundary: list[PlacedIntervention]
    merges: ClassVar[bool] = False

    @classmethod
    def attach(cls, lm: PackedLM, stage: ReftStage) -> ReftAdapter:
        adapter = cls(placed=[], at_boundary=[])
        for layer in stage_layers(stage):
            fresh = KINDS[stage.kind](lm.hidden_size, stage.rank, stage.dropout).to(lm.device)
            placed = PlacedIntervention(layer=layer, positions=stage.positions, intervention=fresh)
            same_place = [other for other in lm.interventions if other.same_place(placed)]
            earlier = same_place[-1] if same_place and stage.init == "previous" else None
            if earlier is None:
                lm.interventions.add(placed)
            adapter.placed.append(placed if earlier is None else earlier)
            adapter.modules[-1].dropout.p = stage.dropout
            adapter.modules[-1].unfreeze()
        adapter.at_boundary = _from_first_trained(adapter.placed, list(lm.interventions))
        return adapter

    @property
    def modules(self) -> list[ReftIntervention]:
        return [cast(ReftIntervention, placed.intervention) for placed in self.placed]

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{index}.{name}": parameter
            for index, module in enumerate(self.modules)
            for name, parameter in module.named_parameters()
        }

    def boundary(self) -> Boundary:
        layer = min(placed.layer for placed in self.placed)
        return Boundary(
            layer=layer + 1,
            interventions=tuple(self.at_boundary),
            positions=tuple(placed.positions for placed in self.placed),
            clear_above=self.at_boundary == self.placed,
        )

    def train(self, mode: bool) -> None:
        for module in self.modules:
            module.dropout.train(mode)

    def finish(self, probes: Sequence[Example]) -> None:
        for module in self.modules:
            module.freeze()
            module.dropout.eval()

    def no_decay(self) -> set[str]:
        return {f"{index}.{name}" for index, module in enumerate(self.modules) for name in module.no_decay()}

    def buffers(self) -> dict[str, Tensor]:
        return {
            f"{index}.{name}": buffer
            for index, module in enumerate(self.modules)
            for name, buffer in module.named_buffers()
        }

    def check(self) -> None:
        for module in self.modules:
            module.check()


def _from_first_trained(
    trained: list[PlacedIntervention], placed: list[PlacedIntervention]
) -> list[PlacedIntervention]:
    layer = min(intervention.layer for intervention in trained)
    at_layer = [intervention for intervention in placed if intervention.layer == layer]
    first = min(at_layer.index(intervention) for intervention in trained if intervention.layer == layer)
    return at_layer[first:]
