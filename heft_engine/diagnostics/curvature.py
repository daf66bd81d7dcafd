"""Curvature of stage 2's loss: the Gauss-Newton matrix in the parameters of the intervention.

With logits z = f(θ) of N supervised tokens, the Hessian of cross-entropy in them is H_t = diag(p_t) − p_t·p_tᵀ, and

    G = 1/N Σ_t J_tᵀ H_t J_t,   J_t = ∂z_t/∂θ          (Schraudolph 2002; Martens, arXiv 1412.1193, section 8)

is positive semidefinite, and equals the Hessian if the logits are linear in θ. R is constrained to the Stiefel manifold
of matrices with orthonormal columns Q = Rᵀ, so G is projected onto its tangent space at Q on both sides (Edelman, Arias
and Smith, arXiv physics/9806030, section 2.2):

    P(Z) = Z − Q·sym(QᵀZ)

W, b and the matrices of other kinds are unconstrained. The largest eigenvalue λ₁ is computed by Lanczos, the trace by
Hutchinson's estimator; tr/λ₁ is the effective number of directions with curvature: 1 means one steep direction.

Rows run through the activation cache once, in float32, with an explicit attention (torch's has no second derivative on
a CPU). A product with G is two backward passes: J·v as the gradient of (Jᵀu)·v in u, then Jᵀ of the result.
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
from heft_engine.runtime.transfers import index_tensor
from heft_engine.training.activation_cache import SuffixCache

#: Rows of one forward pass through the upper layers.
BATCH_ROWS = 16
Parameters = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class InitialIntervention:
    """The initial intervention of stage 2, at a layer's output. Measurements leave it unchanged."""

    layer: int
    positions: str
    intervention: ReftIntervention

    def cache(self, lm: PackedLM, examples: Sequence[Example]) -> SuffixCache:
        """Caches the activations of examples that don't depend on the intervention. `lm` must have none."""
        placed = PlacedIntervention(
            layer=self.layer, positions=self.positions, intervention=self.intervention
        )
        boundary = Boundary(layer=self.layer + 1, interventions=(placed,), positions=(self.positions,))
        return SuffixCache(lm, boundary, examples, CacheLevel.KV)


class _Batch:
    """The logits of a batch of rows at fixed parameters, with the graphs of their first and second derivatives."""

    def __init__(self, logits: Callable[[Parameters], Tensor], parameters: Parameters) -> None:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
        self._names, self._leaves = list(leaves), list(leaves.values())
        self._logits = logits(leaves)
        self._probabilities = torch.softmax(self._logits.detach(), dim=-1)
        self._u = torch.zeros_like(self._logits, requires_grad=True)
        self._jt_u = torch.autograd.grad(self._logits, self._leaves, self._u, create_graph=True)

    def product(self, direction: Parameters) -> Parameters:
        """Σ_t J_tᵀ H_t J_t·v."""
        v = [direction[name] for name in self._names]
        (j_v,) = torch.autograd.grad(self._jt_u, self._u, v, retain_graph=True)
        p = self._probabilities
        h_j_v = p * j_v - p * (p * j_v).sum(-1, keepdim=True)
        g_v = torch.autograd.grad(self._logits, self._leaves, h_j_v, retain_graph=True)
        return dict(zip(self._names, g_v, strict=True))


class GaussNewton:
    """G at the initial intervention, over the rows of a cache. Vectors are all parameters, flat, on the CPU."""

    def __init__(self, cache: SuffixCache, initial: InitialIntervention) -> None:
        self._initial = initial
        self._lm = cache.lm
        self.parameters: Parameters = {
            name: tensor.to(cache.lm.device) for name, tensor in initial.intervention.export_state().items()
        }
        self._functions = [
            self._function(cache, range(start, min(start + BATCH_ROWS, len(cache.rows))))
            for start in range(0, len(cache.rows), BATCH_ROWS)
        ]
        self._batches = [_Batch(function, self.parameters) for function in self._functions]
        self.tokens = sum(row.example.supervised_tokens for row in cache.rows)

    @property
    def size(self) -> int:
        return sum(tensor.numel() for tensor in self.parameters.values())

    def product(self, vector: Tensor) -> Tensor:
        """P·G·P·v."""
        direction = self._project(self._split(vector.float().to(self._lm.device)))
        total = torch.zeros(self.size, device=self._lm.device)
        for batch in self._batches:
            total += self._join(batch.product(direction))
        self._lm.on_forward()
        return self._join(self._project(self._split(total))).cpu() / self.tokens

    def tangent(self, generator: torch.Generator) -> Tensor:
        """Returns a random vector of the tangent space."""
        vector = torch.randn(self.size, generator=generator).to(self._lm.device)
        return self._join(self._project(self._split(vector))).cpu()

    def logits(self) -> list[Callable[[Parameters], Tensor]]:
        """Returns the supervised tokens' logits as functions of the parameters, one for each batch."""
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
        lm, kind = self._lm, type(self._initial.intervention)
        states, positions, layout = cache.suffix(indices)
        at = index_tensor(layout.intervened(*parse_positions(self._initial.positions)), states.device)
        reads = [
            start + offset
            for row, index in zip(layout.rows, indices, strict=True)
            for start in [row.start + row.prompt - row.cached_tokens - 1]
            for offset in range(len(cache.rows[index].example.answers[0]))
        ]
        supervised = index_tensor(reads, states.device)

        def logits(parameters: Parameters) -> Tensor:
            h = states[0, at]
            edited = states.index_copy(1, at, (h + edit(kind, parameters, h))[None])
            last = lm.run_layers(edited, positions, layout, cache.boundary.layer, lm.n_layers)
            return lm.logits(lm.finish(last)[0, supervised])

        return logits


def edit(kind: type[ReftIntervention], parameters: Parameters, h: Tensor) -> Tensor:
    """Φ(h) − h as a function of the parameters, under the names of `export_state`."""
    projection = parameters["rotate_layer"] if kind.rotated else parameters["proj_layer"].T
    change = parameters["bias"].expand(len(h), -1)
    if kind.reads:
        change = change + h @ parameters["weight"].T
    if kind.subtracts:
        change = change - h @ projection
    return change @ projection.T


def curvature(
    lm: PackedLM,
    initial: InitialIntervention,
    examples: Sequence[Example],
    *,
    seed: int,
    steps: int,
    probes: int,
) -> dict[str, Any]:
    """Estimates λ₁, the trace and their ratio, with the errors of the estimates."""
    matrix = GaussNewton(initial.cache(lm, examples), initial)
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


def new_intervention(kind: str, hidden_size: int, rank: int, seed: int) -> ReftIntervention:
    """Returns a newly initialised, frozen intervention; equal arguments give equal ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        intervention = KINDS[kind](hidden_size, rank)
    intervention.freeze()
    return intervention
