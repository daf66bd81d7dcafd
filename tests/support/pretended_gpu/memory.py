"""A ledger of the bytes that live tensors take on each GPU, as the caching allocator rounds them."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

#: The caching allocator gives out multiples of so many bytes.
_BLOCK = 512


class Memory(TorchDispatchMode):
    """Bytes by device ("cuda:0"): those of live tensors now, and their peak.

    A tensor that passes the limit of its device raises torch.OutOfMemoryError.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        #: Limits below a device's size, by device.
        self.limits: dict[str, int] = {}
        self._sizes: dict[int, int] = {}

    def limit(self, device: str) -> int:
        return min(self.size, self.limits.get(device, self.size))

    def reset_peak(self, device: str = "cuda:0") -> None:
        """Sets the peak to what is live now."""
        self.peak[device] = self.now[device]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == "cuda":
                self._count(leaf)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, device = storage._cdata, str(tensor.device)
        if key in self._sizes:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        if self.now[device] + size > self.limit(device):
            free = self.limit(device) - self.now[device]
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size} bytes; {free} are free."
            )
        self._sizes[key] = size
        self.now[device] += size
        self.peak[device] = max(self.peak[device], self.now[device])
        weakref.finalize(storage, self._free, key, device)

    def _free(self, key: int, device: str) -> None:
        self.now[device] -= self._sizes.pop(key, 0)
