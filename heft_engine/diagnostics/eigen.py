"""Eigenvalues and trace of a symmetric matrix that is only known by its products.

    Lanczos      tridiagonal T with the Ritz values of a Krylov space (Lanczos 1950), every new vector orthogonalised
                 anew against all before; an eigenvalue lies within |β_m·s_m| of the largest Ritz value (Paige 1980),
                 which itself never exceeds the largest eigenvalue
    Hutchinson   tr(A) = E[zᵀAz] for z of random signs (Hutchinson 1990), with the standard error of the mean

It does NOT know what the matrix is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Ritz:
    """Ritz values, largest first, and how far from the first the nearest eigenvalue may lie."""

    values: list[float]
    error: float


def lanczos(product: Product, start: Tensor, steps: int) -> Ritz:
    """Of a symmetric A, from `start` (n,). Vectors are float64, whatever the product is computed in."""
    basis = [start.double() / start.double().norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(steps, len(start))):
        image = product(basis[-1]).double()
        diagonal.append(float(basis[-1] @ image))
        known = torch.stack(basis)
        for _ in range(2):  # once is not enough in floating point
            image = image - known.T @ (known @ image)
        beside.append(float(image.norm()))
        if beside[-1] <= 1e-10 * max(map(abs, diagonal)):
            break
        basis.append(image / beside[-1])
    size = len(diagonal)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.tensor(beside[: size - 1], dtype=torch.float64)
    tridiagonal += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    return Ritz(values=values.flip(0).tolist(), error=beside[size - 1] * abs(float(vectors[-1, -1])))


@dataclass(frozen=True, kw_only=True)
class Trace:
    value: float
    standard_error: float


def hutchinson(product: Product, size: int, probes: int, generator: torch.Generator) -> Trace:
    """The trace of A (n, n), by `probes` products."""
    found = []
    for _ in range(probes):
        signs = torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1
        found.append(float(signs.double() @ product(signs).double()))
    values = torch.tensor(found, dtype=torch.float64)
    error = float(values.std() / probes**0.5) if probes > 1 else float("inf")
    return Trace(value=float(values.mean()), standard_error=error)
