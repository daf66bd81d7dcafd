"""The content of stages as JSON values, by the SHA-256 of their tensors: equal for models with equal numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heft_engine.adapters.lora.weights import LoraWeights


def adapter_content(adapter: LoraWeights) -> list[Any]:
    """Returns the scaling of an adapter, and the hashes of its factors and magnitudes."""
    factors = {name: [tensor_hash(factor) for factor in pair] for name, pair in adapter.factors.items()}
    return [adapter.scaling, factors, tensor_hashes(adapter.magnitudes or {})]


def tensor_hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: tensor_hash(tensor) for name, tensor in tensors.items()}


def tensor_hash(tensor: Tensor) -> str:
    """Returns the SHA-256 of a tensor's bytes, followed by its shape."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest() + str(tuple(tensor.shape))
