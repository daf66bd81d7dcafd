"""Copies of a model that share all weights but a few: a merged copy costs what its adapters change."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn

from heft_engine.model.packed_lm import PackedLM


def copy_sharing_weights(model: nn.Module, copied: Collection[str]) -> nn.Module:
    """Returns a copy without hooks that shares all tensors but the weights of the modules named in `copied`.

    Raises ValueError for a model that accelerate has spread over devices: its layers' calls are bound to the original
    modules.
    """
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError("a model spread over several devices can't be copied")
    copied_ids = {id(model.get_submodule(name)._parameters.get("weight")) for name in copied}
    memo = {id(tensor): tensor for tensor in _tensors(model) if id(tensor) not in copied_ids}
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        # Bound to the original modules while a pass runs (heft_engine.cpu.fused_layers).
        module.__dict__.pop("forward", None)
        module._forward_hooks.clear()
        module._forward_hooks_with_kwargs.clear()
        module._forward_hooks_always_called.clear()
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks_with_kwargs.clear()
    return twin


def unique_bytes(lm: PackedLM, beside: PackedLM | None = None) -> int:
    """Returns the bytes of a model's tensors with their packed copies, without those shared with `beside`."""
    shared = {tensor.data_ptr() for tensor in _tensors(beside.model)} if beside is not None else set()
    sizes = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size() + lm.backend.packed_bytes(tensor)
        for tensor in _tensors(lm.model)
        if tensor.data_ptr() not in shared
    }
    return sum(sizes.values())


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
