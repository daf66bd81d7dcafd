"""The parts of torch and transformers that ask for a real GPU or real bytes, replaced for tensors without numbers."""

from __future__ import annotations

import copyreg
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import _TYPES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

aten = torch.ops.aten
_cpu_attention = F.scaled_dot_product_attention
_cpu_randperm = torch.randperm


def replace() -> None:
    """Replaces them until the process ends."""
    import transformers.modeling_utils

    FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[assignment, method-assign]
    FakeTensor.tolist = _tolist  # type: ignore[method-assign]
    FakeTensor.numpy = lambda tensor: np.zeros(tensor.shape, np.uint8)  # type: ignore[method-assign, assignment]
    torch.utils.swap_tensors = _swap_tensors
    torch.randperm = _randperm
    F.scaled_dot_product_attention = _attention
    transformers.modeling_utils.safe_open = _SafeFile
    # bitsandbytes looks for it when it is imported; torch's CPU build has none.
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # type: ignore[attr-defined]


def _randperm(*args: Any, **options: Any) -> Tensor:
    """A real permutation on the CPU: the order of the rows is no matter of the GPU's."""
    with unset_fake_temporarily():
        return _cpu_randperm(*args, **options)


class _SafeFile:
    """A safetensors file, of which the header alone is read."""

    def __init__(self, path: str | Path, **options: Any) -> None:
        with Path(path).open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            self._entries: dict[str, Any] = json.loads(file.read(length))
        self._metadata = self._entries.pop("__metadata__", None)

    def __enter__(self) -> _SafeFile:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def metadata(self) -> Any:
        return self._metadata

    def keys(self) -> list[str]:
        return list(self._entries)

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._entries[name])

    def get_tensor(self, name: str) -> Tensor:
        return self.get_slice(name)[...]


class _Slice:
    """A tensor of a file, made when it is read."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self._entry = entry

    def get_shape(self) -> list[int]:
        return list(self._entry["shape"])

    def get_dtype(self) -> str:
        return str(self._entry["dtype"])

    def __getitem__(self, index: Any) -> Tensor:
        return torch.empty(self._entry["shape"], dtype=_TYPES[self._entry["dtype"]])[index]


def _tolist(tensor: FakeTensor) -> Any:
    """One copy to the host, then numbers that do no harm. FakeTensor's own asks for each number alone."""
    host = tensor.cpu()

    def nested(shape: tuple[int, ...]) -> Any:
        return [nested(shape[1:]) for _ in range(shape[0])] if shape else number(host)

    return nested(tuple(host.shape))


def number(tensor: Tensor) -> bool | int | float:
    """Returns the number that every entry of a tensor is said to be."""
    if tensor.dtype == torch.bool:
        return True
    return 1e-4 if tensor.is_floating_point() else 1


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Chooses as a build with CUDA: flash attention in half precision without a mask, memory-efficient otherwise."""
    if q.device.type != "cuda":
        return _cpu_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is None and q.dtype in (torch.bfloat16, torch.float16):
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
    if enable_gqa and q.shape[1] != k.shape[1]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float("-inf"))
        attn_mask = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    differentiable = any(tensor.requires_grad for tensor in (q, k, v))
    efficient = aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, attn_mask, differentiable, dropout_p, is_causal, scale=scale)[0]


def _swap_tensors(left: Tensor, right: Tensor) -> None:
    """torch's own, without its check of weak references: FakeTensorMode holds one to every tensor."""
    for name in ("__class__", "__dict__"):
        attributes = getattr(left, name), getattr(right, name)
        setattr(right, name, attributes[0])
        setattr(left, name, attributes[1])
    for slot in set(copyreg._slotnames(left.__class__)):  # type: ignore[attr-defined]
        values = getattr(left, slot, None), getattr(right, slot, None)
        setattr(right, slot, values[0])
        setattr(left, slot, values[1])
    torch._C._swap_tensor_impl(left, right)
