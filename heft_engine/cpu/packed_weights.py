"""Weights in the order in which a CPU's matrix units read them, kept beside the weights themselves.

A bfloat16 product on a CPU begins by putting its weights into that order, every time. In passes of a hundred tokens,
and for every single token that is written, that takes as long as the product. Kept, it takes as much memory as the
weights. The order is that of heft_engine.cpu.amx where there are AMX, and the library's own elsewhere:
its packed and plain products of a shape agree to the bit at many heights and not at all of them, and
heft_engine.model.batch_invariant finds out which. This module does NOT know models, heights or budgets.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from heft_engine.cpu import operators
from heft_engine.cpu.amx import AmxOps

#: On a weight: its version when it was packed, the packed tensor, and whether that is for AMX. It lives as
#: long as the weight, and is no longer valid once the weight is written to.
_NAME = "heft_packed"


def packable(weight: Tensor) -> bool:
    """Whether this machine has a packed product for a weight (out, in)."""
    return amx_for_weight(weight) is not None or _is_packed_by_torch(weight)


def amx_for_weight(weight: Tensor) -> AmxOps | None:
    """The AMX operators, if they support a weight (out, in)."""
    amx_ops = operators.amx_ops()
    return amx_ops if amx_ops is not None and amx_ops.supports(weight) else None


def _is_packed_by_torch(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def packed(weight: Tensor) -> Tensor:
    """A weight (out, in) in the matrix units' order: for them, or for `product` where they don't take it."""
    amx_ops = amx_for_weight(weight)
    if amx_ops is not None:
        return amx_ops.pack(weight.detach())
    return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight.detach()))


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows (n, in) times a weight that torch has packed, plus bias (out,) → (n, out)."""
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], ""))


def pack(layers: Iterable[nn.Module]) -> None:
    """Keeps the packed weights of all linear layers that have one."""
    for weight in _weights(layers):
        if kept(weight) is None and packable(weight):
            setattr(weight, _NAME, (_version(weight), packed(weight), amx_for_weight(weight) is not None))


def unpack(layers: Iterable[nn.Module]) -> None:
    """Lets them go again."""
    for weight in _weights(layers):
        weight.__dict__.pop(_NAME, None)


def kept(weight: Tensor) -> Tensor | None:
    """What `pack` has kept of a weight, unless the weight has changed since, or who multiplies it."""
    found = weight.__dict__.get(_NAME)
    if found is None or found[0] != _version(weight) or found[2] != (amx_for_weight(weight) is not None):
        return None
    return cast(Tensor, found[1])


def bytes_to_pack(layers: Iterable[nn.Module]) -> int:
    """What `pack` would add for weights that are not packed yet."""
    return sum(w.numel() * w.element_size() for w in _weights(layers) if packable(w) and kept(w) is None)


def kept_bytes(weight: Tensor) -> int:
    """What is kept of one weight; a little padding aside."""
    return 0 if kept(weight) is None else weight.numel() * weight.element_size()


def _version(weight: Tensor) -> int:
    """How often it was written to; nobody counts that of tensors made for inference alone."""
    return 0 if weight.is_inference() else weight._version


def _weights(layers: Iterable[nn.Module]) -> list[Tensor]:
    modules = (module for layer in layers for module in layer.modules())
    return [module.weight for module in modules if isinstance(module, nn.Linear)]
