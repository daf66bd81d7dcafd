"""A model that shares with another every weight but a few: a merged copy costs what its adapters touch.

It does NOT know adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn

from heft_engine.model.packed_lm import PackedLM


def copy_sharing(model: nn.Module, own: Collection[str]) -> nn.Module:
    """The same model with the weights of the modules named in `own` copied and all other tensors shared.

    Hooks stay behind. Raises ValueError for a model that accelerate has spread over devices: its layers' calls are
    bound to the very modules.
    """
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError("a model spread over several devices can't be copied")
    fresh = {id(model.get_submodule(name).weight) for name in own}
    tensors = [*model.parameters(), *model.buffers()]
    shared = {id(tensor): tensor for tensor in tensors if id(tensor) not in fresh}
    twin = copy.deepcopy(model, dict(shared))
    for module in twin.modules():
        module.__dict__.pop(
            "forward", None
        )  # bound to the very modules, while a pass runs (heft_engine.cpu.fused_layers)
        module._forward_hooks.clear()
        module._forward_hooks_with_kwargs.clear()
        module._forward_hooks_always_called.clear()
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks_with_kwargs.clear()
    return twin


def unique_bytes(lm: PackedLM, beside: PackedLM | None = None) -> int:
    """Bytes of a model's tensors, packed ones too, without those that it shares with another."""
    known = {tensor.data_ptr() for tensor in _tensors(beside.model)} if beside is not None else set()
    seen: dict[int, int] = {}
    for tensor in _tensors(lm.model):
        if tensor.data_ptr() not in known:
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size() + lm.backend.packed_bytes(tensor)
    return sum(seen.values())


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
