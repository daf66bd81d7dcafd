"""Linear layers whose frozen weights are stored in 4 bits: NF4 (arXiv 2305.14314, section 3), by bitsandbytes.

A quantised base is the model whose weights are dequantise(quantise(W)), in the model's dtype. It is stored in 4.5 bits
a weight and dequantised layer by layer when a pass needs it, so all that reads `weight` (training, merges, parity,
exports) sees those numbers. A layer that an adapter has been merged into stores its new weight whole: rounding it to 4
bits again would not be what was trained. The head and the embeddings are never quantised.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from heft_engine.errors import ModelError
from heft_engine.model.model_files import UNSUPPORTED

#: Weights that share one scale.
BLOCK_SIZE = 64


class Nf4Linear(nn.Linear):
    """A linear layer that stores its frozen weight (out, in) in NF4, until `set_weight` replaces it.

    packed: two weights a byte, (out · in / 2, 1), uint8. absmax: the scale of each BLOCK_SIZE weights, float32.
    dense: the weight that replaced them.
    """

    packed: Tensor | None
    absmax: Tensor | None
    dense: nn.Parameter | None

    def __init__(
        self, packed: Tensor, absmax: Tensor, shape: tuple[int, int], dtype: torch.dtype, bias: Tensor | None
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make a dense weight
        self.out_features, self.in_features = shape
        self.dtype = dtype
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", absmax)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.register_parameter("dense", None)

    @property
    def is_quantized(self) -> bool:
        return self.dense is None

    @property
    def device(self) -> torch.device:
        tensor = self.packed if self.dense is None else self.dense
        assert tensor is not None
        return tensor.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Nf4Linear:
        """Moves and casts as `nn.Module.to` asks; the scales stay float32, as the operators read them."""
        scales, self.absmax = self.absmax, None
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scales is not None:
            self.absmax = scales.to(self.device)
        return self

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight that passes multiply with, (out, in): dequantised anew at each access, or the one that was set."""
        if self.dense is not None:
            return self.dense
        dequantize = torch.ops.bitsandbytes.dequantize_4bit.default
        shape = [self.out_features, self.in_features]
        return cast(Tensor, dequantize(self.packed, self.absmax, BLOCK_SIZE, "nf4", shape, self.dtype))

    def set_weight(self, weight: Tensor) -> None:
        """Stores another weight (out, in), whole, in place of the quantised one."""
        device = self.device
        self.dense = nn.Parameter(weight.to(device, self.dtype, copy=True), requires_grad=False)
        self.packed = self.absmax = None

    def forward(self, input: Tensor) -> Tensor:
        if self.is_quantized and torch.is_grad_enabled() and input.requires_grad:
            return cast(Tensor, _Nf4Product.apply(input, self))  # type: ignore[no-untyped-call]
        return F.linear(input, self.weight, self.bias)


class _Nf4Product(torch.autograd.Function):
    """Computes x·Wᵀ + b and saves nothing: the backward pass dequantises W again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Nf4Linear) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.weight, linear.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.linear.weight, None


def set_weight(linear: nn.Module, weight: Tensor) -> None:
    """Replaces the weight of a linear layer, quantised or not, rounded to its dtype."""
    if isinstance(linear, Nf4Linear):
        linear.set_weight(weight)
    else:
        with torch.no_grad():
            cast(Any, linear).weight.copy_(weight)


def growth_bytes(linear: nn.Module) -> int:
    """Returns the bytes that storing a layer's weight whole would add; 0 where it is whole."""
    if not isinstance(linear, Nf4Linear) or not linear.is_quantized:
        return 0
    stored = sum(tensor.numel() * tensor.element_size() for tensor in linear.buffers())
    return linear.in_features * linear.out_features * linear.dtype.itemsize - stored


def is_quantized(model: nn.Module) -> bool:
    """Returns whether any of a model's layers stores its weight in 4 bits."""
    return bool(quantized_sizes(model))


def quantized_sizes(model: nn.Module) -> list[int]:
    """Returns the number of weights of each layer that stores them in 4 bits: they are no parameters."""
    layers = (module for module in model.modules() if isinstance(module, Nf4Linear) and module.is_quantized)
    return [layer.in_features * layer.out_features for layer in layers]


def loading_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Returns transformers' configuration to quantise a model's linear layers while it is loaded.

    Raises ModelError where bitsandbytes is not installed.
    """
    _import_bitsandbytes()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.uint8,
    )


def replace_bitsandbytes_layers(model: nn.Module) -> None:
    """Replaces the layers that transformers has loaded with `loading_config` by Nf4Linear, which share their storage.

    bitsandbytes' own round products of one row otherwise than those of many, and peft has another class of adapters for
    them. The model no longer says that it is quantised: transformers and peft treat it like any other.
    """
    linear_4bit = _import_bitsandbytes().nn.Linear4bit
    for name, module in list(model.named_modules()):
        if isinstance(module, linear_4bit):
            model.set_submodule(name, _from_bitsandbytes(module))
    model_attributes: Any = model
    del model_attributes.config.quantization_config
    model_attributes.is_loaded_in_4bit = model_attributes.is_quantized = False
    model_attributes.hf_quantizer = model_attributes.quantization_method = None


def _import_bitsandbytes() -> Any:
    """Imports bitsandbytes, which takes two seconds, and registers its operators."""
    # It advises to install `kernels`, which asks the hub for code.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        message = "base_quantization nf4 needs the package bitsandbytes, which is not installed"
        raise ModelError(message, param="base_quantization", code=UNSUPPORTED) from error


def _from_bitsandbytes(linear: Any) -> Nf4Linear:
    weight, state = linear.weight, linear.weight.quant_state
    bias = None if linear.bias is None else linear.bias.detach()
    return Nf4Linear(weight.data, state.absmax, tuple(state.shape), state.dtype, bias)


def quantized(linear: nn.Linear) -> Nf4Linear:
    """Returns a linear layer with its weight rounded to NF4. Raises ModelError where bitsandbytes is not installed."""
    _import_bitsandbytes()
    weight = linear.weight.detach()
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(weight, BLOCK_SIZE, "nf4", torch.uint8)
    bias = None if linear.bias is None else linear.bias.detach()
    return Nf4Linear(packed, absmax, (linear.out_features, linear.in_features), weight.dtype, bias)


def quantize_without_numbers(model: nn.Module) -> None:
    """Replaces linear layers by those that quantising would give, with weights of any value: for models on "meta"."""
    _import_bitsandbytes()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            count = module.in_features * module.out_features
            device = module.weight.device
            packed = torch.empty(-(-count // 2), 1, dtype=torch.uint8, device=device)
            absmax = torch.empty(-(-count // BLOCK_SIZE), dtype=torch.float32, device=device)
            shape = (module.out_features, module.in_features)
            model.set_submodule(name, Nf4Linear(packed, absmax, shape, module.weight.dtype, module.bias))


def store_dense(model: nn.Module) -> None:
    """Replaces every Nf4Linear by an nn.Linear with the weight that it has. The model then takes its full memory."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Nf4Linear):
            dense = nn.Linear(
                module.in_features, module.out_features, bias=module.bias is not None, device="meta"
            )
            dense.weight = nn.Parameter(module.weight.detach(), requires_grad=False)
            dense.bias = module.bias
            model.set_submodule(name, dense)
