"""The arithmetic of LoRA's variants: initial factors (PiSSA, OLoRA) and magnitudes of rows (DoRA).

PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) train W' = (W − s·B₀A₀) + s·BA, with s·B₀A₀ the largest part of W
itself. Here W stays as it is, and the same W' is written as plain LoRA of rank 2r on it:

    W' = W + s·(BA − B₀A₀) = W + s·[B − B₀, B₀]·[A; A − A₀]

Both halves are small where training has changed little, so nothing cancels in bfloat16, and nothing of W is rounded
anew. peft's own conversions either recompute A₀ and B₀ (at random, for pissa_niter) or leave DoRA's magnitude out.

DoRA (arXiv 2402.09353): W' = m · V / ‖V‖ row by row, V = W + s·BA, with the norm held constant in the gradient. With
PiSSA, V is the W' above: DoRA of rank 2r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heft_engine.config.train import LoraInit

Factors = tuple[Tensor, Tensor]
#: Norms are at least this, so a row of zeros stays zero.
_TINY = 1e-30


def initial_factors(weight: Tensor, rank: int, scaling: float, init: LoraInit) -> Factors:
    """Returns (A₀, B₀) for W (out, in), float32 on its device: s·B₀A₀ is W's largest part, as in peft."""
    exact = weight.detach().float()
    if init == "olora":
        q, r = torch.linalg.qr(exact)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    if init == "pissa":
        left, values, right = torch.linalg.svd(exact, full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right[:rank]
    else:
        left, values, columns = torch.svd_lowrank(exact, rank, niter=int(init.removeprefix("pissa_niter_")))
        right = columns.T
    root = (values / scaling).sqrt()
    return (root[:, None] * right).contiguous(), (left * root).contiguous()


def widened(factors: Factors, initial: Factors) -> Factors:
    """Returns BA − B₀A₀ as the factors of one product of rank 2r: ([A; A − A₀], [B − B₀, B₀])."""
    (down, up), (down0, up0) = factors, initial
    return torch.cat([down, down - down0]), torch.cat([up - up0, up0], dim=1)


def row_norms(direction: Tensor) -> Tensor:
    """Returns ‖V‖ of each row of V (out, in)."""
    norms: Tensor = torch.linalg.vector_norm(direction, dim=1)
    return norms.clamp_min(_TINY)


def with_magnitude(direction: Tensor, magnitude: Tensor) -> Tensor:
    """Returns m · V / ‖V‖, row by row."""
    return (magnitude / row_norms(direction))[:, None] * direction
