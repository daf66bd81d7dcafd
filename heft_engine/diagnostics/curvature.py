"""The curvature that stage 2 meets: the Gauss-Newton matrix of its loss in the intervention's own parameters.

With logits z = f(θ) of N supervised tokens, cross-entropy has H_t = diag(p_t) − p_t·p_tᵀ in them, and

    G = 1/N Σ_t J_tᵀ H_t J_t,   J_t = ∂z_t/∂θ          (Schraudolph 2002; Martens, arXiv 1412.1193, section 8)

positive semidefinite, and the Hessian where the logits are linear in θ. R moves on the Stiefel manifold of matrices
with orthonormal columns Q = Rᵀ, so G acts between projections onto its tangent space at Q (Edelman, Arias and Smith,
arXiv physics/9806030, section 2.2):

    P(Z) = Z − Q·sym(QᵀZ)

W, b and the matrices of other kinds are free. Largest eigenvalue by Lanczos, trace by Hutchinson's estimator; their
ratio tr/λ₁ says over how many directions the curvature is spread: 1 is one steep direction.

Rows run through the suffix cache once, in float32, with its attention written out (the library's own has no second
derivative on a CPU); a product with G is then two backward passes: J·v as the gradient, in u, of (Jᵀu)·v, and Jᵀ of the
rest. It does NOT know stages or bundles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heft_engine.adapters.adapter import Boundary
from heft_engine.adapters.reft import KINDS, ReftIntervention
from heft_engine.config.flops import CacheLevel
from heft_engine.config.train import parse_positions
from heft_engine.data.encoding import Example
from heft_engine.diagnostics.eigen import hutchinson, lanczos
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.packed_lm import PackedLM
from heft_engine.training.activation_cache import SuffixCache

#: Rows that go through the upper layers together.
ROWS = 16
Parameters = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where stage 2 begins: an intervention, unchanged by what is measured, at a layer's output."""

    layer: int
    positions: str
    intervention: ReftIntervention

    def cache(self, lm: PackedLM, examples: Sequence[Example]) -> SuffixCache:
        """What is frozen of these rows below and left of the intervention. `lm` has none in place."""
        placed = PlacedIntervention(
            layer=self.layer, positions=self.positions, intervention=self.intervention
        )
        boundary = Boundary(layer=self.layer + 1, interventions=(placed,), positions=(self.positions,))
        return SuffixCache(lm, boundary, examples, CacheLevel.KV)


class _Part:
    """Some rows' logits at fixed parameters, with the graphs of their first and second derivatives kept."""

    def __init__(self, logits: Callable[[Parameters], Tensor], parameters: Parameters) -> None:
        own = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
        self._names, self._own = list(own), list(own.values())
        self._logits = logits(own)
        self._probabilities = torch.softmax(self._logits.detach(), dim=-1)
        self._u = torch.zeros_like(self._logits, requires_grad=True)
        self._pulled = torch.autograd.grad(self._logits, self._own, self._u, create_graph=True)

    def product(self, direction: Parameters) -> Parameters:
        """Σ_t J_tᵀ H_t J_t·v."""
        given = [direction[name] for name in self._names]
        (moved,) = torch.autograd.grad(self._pulled, self._u, given, retain_graph=True)
        p = self._probabilities
        curved = p * moved - p * (p * moved).sum(-1, keepdim=True)
        found = torch.autograd.grad(self._logits, self._own, curved, retain_graph=True)
        return dict(zip(self._names, found, strict=True))


class GaussNewton:
    """G, at the place's own parameters, over the rows of a cache; vectors are all parameters flat, (n,)."""

    def __init__(self, cache: SuffixCache, place: Place) -> None:
        self._place = place
        self._lm = cache.lm
        self.parameters: Parameters = place.intervention.export_state()
        self._functions = [
            self._function(cache, range(start, min(start + ROWS, len(cache.rows))))
            for start in range(0, len(cache.rows), ROWS)
        ]
        self._parts = [_Part(function, self.parameters) for function in self._functions]
        self.tokens = sum(row.example.supervised_tokens for row in cache.rows)

    @property
    def size(self) -> int:
        return sum(tensor.numel() for tensor in self.parameters.values())

    def product(self, vector: Tensor) -> Tensor:
        """P·G·P·v."""
        direction = self._project(self._split(vector.float()))
        total = torch.zeros(self.size)
        for part in self._parts:
            total += self._join(part.product(direction))
        self._lm.on_forward()
        return self._join(self._project(self._split(total))) / self.tokens

    def tangent(self, generator: torch.Generator) -> Tensor:
        """A random vector of the tangent space."""
        return self._join(self._project(self._split(torch.randn(self.size, generator=generator))))

    def logits(self) -> list[Callable[[Parameters], Tensor]]:
        """Of the supervised tokens, part by part, as functions of the parameters."""
        return self._functions

    def _project(self, direction: Parameters) -> Parameters:
        if "rotate_layer" not in direction:
            return direction
        q, z = self.parameters["rotate_layer"], direction["rotate_layer"]
        inner = q.T @ z
        return {**direction, "rotate_layer": z - q @ (inner + inner.T) / 2}

    def _split(self, vector: Tensor) -> Parameters:
        sizes = [tensor.numel() for tensor in self.parameters.values()]
        parts: Sequence[Tensor] = torch.split(vector, sizes)
        pairs = zip(self.parameters.items(), parts, strict=True)
        return {name: part.view_as(tensor) for (name, tensor), part in pairs}

    @staticmethod
    def _join(parameters: Parameters) -> Tensor:
        return torch.cat([tensor.reshape(-1) for tensor in parameters.values()])

    def _function(self, cache: SuffixCache, indices: Sequence[int]) -> Callable[[Parameters], Tensor]:
        lm, kind = self._lm, type(self._place.intervention)
        states, positions, layout = cache.suffix(indices)
        at = torch.tensor(layout.intervened(*parse_positions(self._place.positions)), device=states.device)
        reads = [
            start + offset
            for row, index in zip(layout.rows, indices, strict=True)
            for start in [row.start + row.prompt - row.skipped - 1]
            for offset in range(len(cache.rows[index].example.answers[0]))
        ]
        wanted = torch.tensor(reads, device=states.device)

        def logits(parameters: Parameters) -> Tensor:
            h = states[0, at]
            edited = states.index_copy(1, at, (h + edit(kind, parameters, h))[None])
            last = lm.run_layers(edited, positions, layout, cache.boundary.layer, lm.n_layers)
            return lm.logits(lm.finish(last)[0, wanted])

        return logits


def edit(kind: type[ReftIntervention], parameters: Parameters, h: Tensor) -> Tensor:
    """Φ(h) − h as a function of the parameters, by the names of `Intervention.export_state`."""
    projection = parameters["rotate_layer"] if kind.rotated else parameters["proj_layer"].T
    change = parameters["bias"].expand(len(h), -1)
    if kind.reads:
        change = change + h @ parameters["weight"].T
    if kind.subtracts:
        change = change - h @ projection
    return change @ projection.T


def curvature(
    lm: PackedLM, place: Place, examples: Sequence[Example], *, seed: int, steps: int, probes: int
) -> dict[str, Any]:
    """λ₁, trace and their ratio, with the errors of their estimates."""
    matrix = GaussNewton(place.cache(lm, examples), place)
    generator = torch.Generator().manual_seed(seed)
    ritz = lanczos(matrix.product, matrix.tangent(generator), steps)
    trace = hutchinson(matrix.product, matrix.size, probes, generator)
    return {
        "rows": len(examples),
        "tokens": matrix.tokens,
        "parameters": matrix.size,
        "largest": ritz.values[0],
        "largest_error": ritz.error,
        "ritz_values": [float(f"{value:.6g}") for value in ritz.values],
        "trace": trace.value,
        "trace_standard_error": trace.standard_error,
        "trace_over_largest": trace.value / ritz.values[0] if ritz.values[0] > 0 else None,
    }


def begin(kind: str, hidden_size: int, rank: int, seed: int) -> ReftIntervention:
    """A fresh intervention, the same for every model it is put into."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        intervention = KINDS[kind](hidden_size, rank)
    intervention.freeze()
    return intervention
