"""Decoder layers that keep less for their gradient, where they are not compiled (a compiler sees to it by itself).

Written out one operation after the other, a norm keeps its input twice, in float32 and behind the norm, and a gated
activation keeps three tensors of the layer's widest. Here a norm keeps its input as it came and one number a token, a
gated activation its two inputs; the rest is computed again for the gradient. Forward bits are those of the modules
themselves, gradients theirs to rounding. It does NOT know attention, LoRA or training.
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
#: What a gated activation is recognised by: every family that has all four multiplies them in the same way.
_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


class RmsNorm(torch.autograd.Function):
    """y = w · cast(x·r), r = 1/√(mean(x²) + ε) in float32, as in Llama. w is frozen.

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
        # Out of place: in a float32 model both may be the very tensors that came in.
        return torch.addcmul(inner * rate, wide, along).to(x.dtype), None, None


class Again(torch.autograd.Function):
    """function(x), of which nothing but x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            own = x.detach().requires_grad_()
            return torch.autograd.grad(ctx.function(own), own, gradients[0])[0], None


class Gated(torch.autograd.Function):
    """activation(gate) ⊙ up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        if isinstance(ctx.activation, (nn.SiLU, SiLUActivation)):
            # The same kernel, without an autograd engine of its own: in short passes that costs more than the rest.
            change = torch.ops.aten.silu_backward(gradients[0] * up, gate)
            return change, F.silu(gate) * gradients[0], None
        with torch.enable_grad():
            own = gate.detach().requires_grad_()
            active = ctx.activation(own)
        (change,) = torch.autograd.grad(active, own, gradients[0] * up)
        return change, active.detach() * gradients[0], None


@contextmanager
def low_memory_layers(lm: PackedLM) -> Iterator[None]:
    """Inside, norms and gated activations keep less wherever gradients are computed."""
    changed: list[nn.Module] = []
    try:
        for module in lm.layers.modules():
            lean = _lean(module)
            if lean is not None:
                module.forward = lean
                changed.append(module)
        yield
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


def _lean(module: nn.Module) -> Forward | None:
    plain = module.forward
    if all(hasattr(module, name) for name in _GATED):
        return _where_it_is_kept(plain, lambda x: _gated(module, x))
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(module.weight, Tensor):
        return None
    epsilon = getattr(module, "variance_epsilon", None)
    if epsilon is None or not _as_in_llama(module, epsilon):
        return _where_it_is_kept(plain, lambda x: cast(Tensor, Again.apply(x, plain)))  # type: ignore[no-untyped-call]
    weight = module.weight
    return _where_it_is_kept(
        plain,
        lambda x: cast(Tensor, RmsNorm.apply(x, weight, epsilon)),  # type: ignore[no-untyped-call]
    )


def _where_it_is_kept(plain: Forward, lean: Forward) -> Forward:
    def forward(x: Tensor) -> Tensor:
        return lean(x) if x.requires_grad and torch.is_grad_enabled() else plain(x)

    return forward


def _gated(module: Any, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    return cast(Tensor, module.down_proj(Gated.apply(gate, up, module.act_fn)))  # type: ignore[no-untyped-call]


@torch.no_grad()
def _as_in_llama(module: nn.Module, epsilon: float) -> bool:
    """Whether a norm's bits are `RmsNorm`'s."""
    weight = cast(Tensor, module.weight)
    x = torch.linspace(-3, 5, 2 * len(weight), device=weight.device).to(weight.dtype).view(2, -1)
    return torch.equal(module(x), cast(Tensor, RmsNorm.apply(x, weight, epsilon)))  # type: ignore[no-untyped-call]
