"""Bases in 4 bits: what they compute, what they store, what is refused."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES
from torch import Tensor, nn
from torch.testing import assert_close

from heft_engine.errors import ModelError
from heft_engine.model import nf4
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.base_models import load_model, resolve_path
from heft_engine.model.packed_lm import PackedLM

MakeTinyModel = Callable[[str], Path]


def load(path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    base = resolve_path(path)
    return load_model(base, dtype=dtype, attention=IMPLEMENTATION, quantization="nf4")


def logits(model: nn.Module) -> Tensor:
    """Returns transformers' own logits of a few tokens."""
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(128, 96).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_products_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    functional = importlib.import_module("bitsandbytes.functional")
    linear = layer().to(dtype)
    packed, state = functional.quantize_4bit(linear.weight, blocksize=nf4.BLOCK_SIZE, quant_type="nf4")
    weight = functional.dequantize_4bit(packed, state)
    quantized = nf4.quantized(linear)
    assert torch.equal(quantized.weight, weight)
    assert quantized.weight.dtype == dtype
    x = torch.randn(5, 7, 128, dtype=dtype, requires_grad=True)
    expected = torch.nn.functional.linear(x, weight, linear.bias)
    assert torch.equal(quantized(x), expected)
    gradient = torch.randn_like(expected)
    (quantized_gradient,) = torch.autograd.grad(quantized(x), x, gradient)
    assert_close(quantized_gradient, torch.autograd.grad(expected, x, gradient)[0])


def test_a_quantised_layer_takes_a_seventh_of_float32_and_its_passes_save_no_weight() -> None:
    linear = nf4.quantized(layer())
    stored = [*linear.parameters(), *linear.buffers()]
    bias_bytes = 4 * 96
    assert sum(t.numel() * t.element_size() for t in stored) - bias_bytes == 128 * 96 * (1 / 2 + 4 / 64)
    saved: list[Tensor] = []
    x = torch.randn(3, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x)
    assert saved == []


def test_a_new_weight_is_stored_whole() -> None:
    linear, weight = nf4.quantized(layer()), torch.randn(96, 128)
    nf4.set_weight(linear, weight)
    assert torch.equal(linear.weight, weight)
    assert not linear.is_quantized
    assert [name for name, _ in linear.named_buffers()] == []
    assert nf4.quantized_sizes(linear) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_the_model_of_its_dequantised_weights(
    make_tiny_model: MakeTinyModel, family: str
) -> None:
    model = load(make_tiny_model(family))
    lm = PackedLM(model)
    quantized = {name for name, part in model.named_modules() if isinstance(part, nf4.Nf4Linear)}
    in_layers = {n for n, part in model.named_modules() if isinstance(part, nn.Linear) and ".layers." in n}
    assert quantized == in_layers
    dense_parameters = PackedLM(
        load_model(resolve_path(make_tiny_model(family)), dtype=torch.float32)
    ).parameters
    assert lm.parameters == dense_parameters
    before = logits(model)
    nf4.store_dense(model)
    assert not any(isinstance(part, nf4.Nf4Linear) for part in model.modules())
    assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def test_a_loaded_model_no_longer_says_that_it_is_quantised(tiny_llama_dir: Path) -> None:
    model = load(tiny_llama_dir, torch.bfloat16)
    assert not hasattr(model.config, "quantization_config")
    assert "quantization_config" not in model.config.to_dict()
    assert (
        model.to(torch.device("cpu")) is model
    )  # transformers refuses this for a model that it knows as quantised


def test_without_bitsandbytes_the_error_names_the_setting_and_the_package(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match="needs the package bitsandbytes") as raised:
        load(tiny_llama_dir)
    assert raised.value.param == "base_quantization"


@pytest.mark.parametrize("move", [lambda layer: layer.bfloat16(), lambda layer: layer.to(torch.bfloat16)])
def test_casting_a_quantised_layer_casts_its_weight_and_not_its_scales(
    move: Callable[[nn.Module], nn.Module],
) -> None:
    linear = nf4.quantized(layer())
    weight = linear.weight
    assert move(linear) is linear
    assert linear.absmax is not None
    assert linear.absmax.dtype == torch.float32
    assert linear.weight.dtype == linear.bias.dtype == torch.bfloat16
    assert_close(linear.weight.float(), weight, rtol=1e-2, atol=1e-3)


def test_growth_is_what_a_merge_adds() -> None:
    linear = nf4.quantized(layer())
    assert nf4.growth_bytes(linear) == 96 * 128 * (4 - 1 / 2 - 4 / 64)
    linear.set_weight(linear.weight)
    assert nf4.growth_bytes(linear) == nf4.growth_bytes(layer()) == 0
