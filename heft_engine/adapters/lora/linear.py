"""LoRA's forward and backward pass in training: a linear layer and its two factors with few passes over memory.

y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ (arXiv 2106.09685, eq. 3). peft multiplies in the factors' float32: in a bfloat16 model every
adapted layer then converts its input, its output and both gradients, and a rank of 8 costs a sixth of all the time that
matrices take. Here the factors are rounded to the model's dtype for the product, as autocast does it, and the low-rank
part is added in place; the factors themselves, their gradients' sums and Adam's state stay float32. In a float32 model
the arithmetic is peft's.

PiSSA's and OLoRA's frozen half is part of the two factors (heft_engine.adapters.lora.variants.widened). DoRA scales the
rows of the product: y = (m/‖V‖) ⊙ x·Vᵀ + b, V = W + s·BA, its norm without a gradient (arXiv 2402.09353, eq. 11).
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from peft import PeftModel
from peft.tuners.lora import Linear
from torch import Tensor, nn

from heft_engine.adapters.lora.peft_layers import initial_of
from heft_engine.adapters.lora.variants import row_norms, widened
from heft_engine.model.nf4 import Nf4Linear


class LoraProduct(torch.autograd.Function):
    """Returns (…, out) for x (…, in), weight (out, in), down (rank, in), up (out, rank). W and b are frozen.

    `quantized`: the layer that W has been dequantised from. W is then not saved for the backward pass, which
    dequantises it again.

    With g = ∂L/∂y: ∂L/∂B = s·gᵀ(xAᵀ), ∂L/∂A = s·(gB)ᵀx, ∂L/∂x = gW + s·(gB)A.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
        quantized: Nf4Linear | None,
    ) -> Tensor:
        a, b = down.to(x.dtype), up.to(x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ a.T
        out = F.linear(flat, weight, bias).addmm_(low, b.T, alpha=scaling)
        ctx.save_for_backward(x, weight if quantized is None else None, a, b, low)
        ctx.scaling, ctx.quantized = scaling, quantized
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, None, None, Tensor, Tensor, None, None]:
        x, weight, a, b, low = ctx.saved_tensors
        grad_out = gradients[0].reshape(-1, gradients[0].shape[-1])
        grad_low = (grad_out @ b).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            weight = weight if ctx.quantized is None else ctx.quantized.weight
            grad_x = (grad_out @ weight).addmm_(grad_low, a).view(x.shape)
        grad_down = grad_low.T @ x.reshape(-1, x.shape[-1])
        grad_up = (grad_out.T @ low).mul_(ctx.scaling)
        return grad_x, None, None, grad_down.float(), grad_up.float(), None, None


def use_fused_forward(peft_model: PeftModel) -> None:
    """Replaces peft's forward pass in every adapted layer without dropout, until the adapter is taken out.

    Layers with dropout keep peft's; they have no frozen half, since settings refuse dropout with PiSSA and OLoRA.
    """
    for module in peft_model.modules():
        if isinstance(module, Linear) and not _has_dropout(module):
            module.forward = MethodType(_forward, module)


def _has_dropout(module: Linear) -> bool:
    return any(getattr(dropout, "p", 0.0) > 0 for dropout in module.lora_dropout.values())


def _forward(module: Any, x: Tensor) -> Tensor:
    base, name = module.base_layer, module.active_adapters[0]
    down, up, scaling = module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
    initial = initial_of(module)
    if initial is not None:
        down, up = widened((down, up), initial)
    if name not in module.lora_magnitude_vector:
        return _product(x, base, base.bias, down, up, scaling)
    with torch.no_grad():
        norms = row_norms(torch.addmm(base.weight.float(), up, down, alpha=scaling))
    # In float32: bfloat16 has no number between 1 and 1.0078, and magnitudes change by less than that.
    factor: Tensor = module.lora_magnitude_vector[name].weight / norms
    scaled = _product(x, base, None, down, up, scaling) * factor
    return (scaled if base.bias is None else scaled + base.bias).to(x.dtype)


def _product(
    x: Tensor, base: nn.Linear, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
) -> Tensor:
    quantized = base if isinstance(base, Nf4Linear) and base.is_quantized else None
    product: Tensor = LoraProduct.apply(x, base.weight, bias, down, up, scaling, quantized)  # type: ignore[no-untyped-call]
    return product
