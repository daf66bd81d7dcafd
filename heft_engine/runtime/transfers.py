"""Copies from the host to a GPU that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor of the host to a device. To a GPU it goes through pinned memory, and the host goes on at once."""
    if device.type != "cuda" or host.device.type != "cpu":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def index_tensor(indices: Sequence[int], device: torch.device) -> Tensor:
    """Returns indices as an int64 tensor (n,) on a device."""
    return to_device(torch.tensor(indices, dtype=torch.long), device)
