"""Eigenvalues and trace of a symmetric matrix that is given by its matrix-vector products.

Lanczos      Ritz values of a Krylov space (Lanczos 1950) with full reorthogonalisation. The largest Ritz value never
             exceeds the largest eigenvalue, and an eigenvalue lies within |β_m·s_m| of it (Paige 1980)
Hutchinson   tr(A) = E[zᵀAz] for random signs z (Hutchinson 1990), with the standard error of the mean
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Ritz:
    """Ritz values, largest first. `error`: the bound on the distance of an eigenvalue from the first."""

    values: list[float]
    error: float


def lanczos(product: Product, start: Tensor, steps: int) -> Ritz:
    """Runs Lanczos iterations for a symmetric A from `start` (n,). Vectors are float64 whatever the product's dtype."""
    basis = [start.double() / start.double().norm()]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    for _ in range(min(steps, len(start))):
        vector = product(basis[-1]).double()
        diagonal.append(float(basis[-1] @ vector))
        orthonormal = torch.stack(basis)
        for _ in range(2):  # one pass of Gram-Schmidt is not enough in floating point
            vector = vector - orthonormal.T @ (orthonormal @ vector)
        off_diagonal.append(float(vector.norm()))
        if off_diagonal[-1] <= 1e-10 * max(map(abs, diagonal)):
            break
        basis.append(vector / off_diagonal[-1])
    size = len(diagonal)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    beta = torch.tensor(off_diagonal[: size - 1], dtype=torch.float64)
    tridiagonal += torch.diag(beta, 1) + torch.diag(beta, -1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    return Ritz(values=values.flip(0).tolist(), error=off_diagonal[size - 1] * abs(float(vectors[-1, -1])))


@dataclass(frozen=True, kw_only=True)
class Trace:
    value: float
    standard_error: float


def hutchinson(product: Product, size: int, probes: int, generator: torch.Generator) -> Trace:
    """Estimates the trace of A (n, n) from `probes` products."""
    samples = []
    for _ in range(probes):
        signs = torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1
        samples.append(float(signs.double() @ product(signs).double()))
    values = torch.tensor(samples, dtype=torch.float64)
    error = float(values.std() / probes**0.5) if probes > 1 else float("inf")
    return Trace(value=float(values.mean()), standard_error=error)
