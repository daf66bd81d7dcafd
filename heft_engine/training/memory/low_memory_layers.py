"""Decoder layers that save less for their backward pass, where they are not compiled (a compiler does this itself).

Operation by operation, a norm saves its input twice, in float32 and normalised, and a gated activation saves three
tensors of the layer's widest size. Here a norm saves its input and one number a token, a gated activation its two
inputs; the rest is recomputed in the backward pass. Forward bits are the modules' own, gradients equal to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from heft_engine.model.packed_lm import PackedLM

Forward = Callable[[Tensor], Tensor]
#: Attributes of a gated MLP: every family that has all four multiplies them in the same way.
_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


class RmsNorm(torch.autograd.Function):
    """Computes y = w · cast(x·r), r = 1/√(mean(x²) + ε) in float32, as in Llama. w is frozen.

    With u = w ⊙ ∂L/∂y: ∂L/∂x = r·(u − x·r²·mean(u ⊙ x)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.float32, copy=True)
        rate = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, rate)
        return weight * wide.mul_(rate).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight, rate = ctx.saved_tensors
        wide, inner = x.float(), (gradients[0] * weight).float()
        along = torch.linalg.vecdot(inner, wide)[..., None] * rate.pow(3).div_(-x.shape[-1])
        # Out of place: in a float32 model both may be the input tensors themselves.
        return torch.addcmul(inner * rate, wide, along).to(x.dtype), None, None


class Recomputed(torch.autograd.Function):
    """Computes function(x) and saves x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(ctx.function(leaf), leaf, gradients[0])[0], None


class GatedActivation(torch.autograd.Function):
    """Computes activation(gate) ⊙ up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        if isinstance(ctx.activation, (nn.SiLU, SiLUActivation)):
            # The same kernel without a nested autograd call, which costs more than the rest in short passes.
            grad_gate = torch.ops.aten.silu_backward(gradients[0] * up, gate)
            return grad_gate, F.silu(gate) * gradients[0], None
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            active = ctx.activation(leaf)
        (grad_gate,) = torch.autograd.grad(active, leaf, gradients[0] * up)
        return grad_gate, active.detach() * gradients[0], None


@contextmanager
def low_memory_layers(lm: PackedLM) -> Iterator[None]:
    """Inside, norms and gated activations save less wherever gradients are computed."""
    replaced: list[nn.Module] = []
    try:
        for module in lm.layers.modules():
            forward = _low_memory_forward(module)
            if forward is not None:
                module.forward = forward
                replaced.append(module)
        yield
    finally:
        for module in replaced:
            module.__dict__.pop("forward", None)


def _low_memory_forward(module: nn.Module) -> Forward | None:
    """Returns a module's forward pass that saves less; None for a module that is neither a norm nor a gated MLP."""
    original = module.forward
    if all(hasattr(module, name) for name in _GATED):
        return _with_gradients(original, lambda x: _gated(module, x))
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(module.weight, Tensor):
        return None
    epsilon = getattr(module, "variance_epsilon", None)
    if epsilon is None or not _has_bits_of_llama(module, epsilon):
        return _with_gradients(original, lambda x: cast(Tensor, Recomputed.apply(x, original)))  # type: ignore[no-untyped-call]
    weight = module.weight
    return _with_gradients(
        original,
        lambda x: cast(Tensor, RmsNorm.apply(x, weight, epsilon)),  # type: ignore[no-untyped-call]
    )


def _with_gradients(original: Forward, low_memory: Forward) -> Forward:
    def forward(x: Tensor) -> Tensor:
        return low_memory(x) if x.requires_grad and torch.is_grad_enabled() else original(x)

    return forward


def _gated(module: Any, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    return cast(Tensor, module.down_proj(GatedActivation.apply(gate, up, module.act_fn)))  # type: ignore[no-untyped-call]


@torch.no_grad()
def _has_bits_of_llama(module: nn.Module, epsilon: float) -> bool:
    """Returns whether a norm has the bits of `RmsNorm`. True on "meta", where there are no bits to compare."""
    weight = cast(Tensor, module.weight)
    if weight.is_meta:
        return True
    x = torch.linspace(-3, 5, 2 * len(weight), device=weight.device).to(weight.dtype).view(2, -1)
    return torch.equal(module(x), cast(Tensor, RmsNorm.apply(x, weight, epsilon)))  # type: ignore[no-untyped-call]
