"""Weights in the order in which the matrix units of a CPU read them, kept beside the weights themselves.

A product begins by putting its weight into that order. In passes of a hundred tokens, and for every single token that
is written, that takes as long as the product. Packed copies take as much memory as the weights. They change no bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn

from heft_engine.cpu import operators
from heft_engine.cpu.amx import AmxOps

#: An attribute of a weight: its version when it was packed, and the packed copy. The copy lives as long as the weight,
#: and is no longer valid once the weight is written to.
_NAME = "heft_packed"


def amx_for_weight(weight: Tensor) -> AmxOps | None:
    """Returns the AMX operators if they support a weight (out, in)."""
    amx_ops = operators.amx_ops()
    return amx_ops if amx_ops is not None and amx_ops.supports(weight) else None


def pack(layers: Iterable[nn.Module]) -> None:
    """Packs the weights of all linear layers that AMX supports."""
    for weight in _weights(layers):
        amx_ops = amx_for_weight(weight)
        if amx_ops is not None and packed_copy(weight) is None:
            setattr(weight, _NAME, (_version(weight), amx_ops.pack(weight.detach())))


def unpack(layers: Iterable[nn.Module]) -> None:
    """Frees the packed copies."""
    for weight in _weights(layers):
        weight.__dict__.pop(_NAME, None)


def packed_copy(weight: Tensor) -> Tensor | None:
    """Returns the packed copy of a weight; None if there is none, if the weight has changed since, or without AMX."""
    version, packed = weight.__dict__.get(_NAME, (None, None))
    if packed is None or version != _version(weight) or amx_for_weight(weight) is None:
        return None
    return cast(Tensor, packed)


def bytes_to_pack(layers: Iterable[nn.Module]) -> int:
    """Returns the bytes that `pack` would add for weights that are not packed yet."""
    packable = (w for w in _weights(layers) if amx_for_weight(w) is not None and packed_copy(w) is None)
    return sum(weight.numel() * weight.element_size() for weight in packable)


def packed_bytes(weight: Tensor) -> int:
    """Returns the bytes of a weight's packed copy, but for a little padding."""
    return 0 if packed_copy(weight) is None else weight.numel() * weight.element_size()


def _version(weight: Tensor) -> int:
    """Returns how often a weight was written to; nobody counts that of tensors made for inference alone."""
    return 0 if weight.is_inference() else weight._version


def _weights(layers: Iterable[nn.Module]) -> list[Tensor]:
    modules = (module for layer in layers for module in layer.modules())
    return [module.weight for module in modules if isinstance(module, nn.Linear)]
