"""A backup of tensors, for work that changes them in place and may fail half-way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Backup:
    """Copies of tensors, in memory of their own from the start: restoring them takes none."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._copies = [torch.empty_like(tensor) for tensor in tensors]

    @torch.no_grad()
    def save(self) -> None:
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            copy.copy_(tensor)

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.copy_(copy)
