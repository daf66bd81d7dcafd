"""Models on a pretended GPU: tiny ones of every family, and the shapes of real ones."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny_models import tiny_config
from torch import nn
from transformers import Gemma2Config, LlamaConfig, PreTrainedConfig

from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.nf4 import quantize_without_numbers
from heft_engine.model.packed_lm import PackedLM

_LLAMA_2_7B: dict[str, Any] = {
    "hidden_size": 4_096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32_000,
    "max_position_embeddings": 4_096,
}
_LLAMA_3_8B = {"intermediate_size": 14_336, "num_key_value_heads": 8, "vocab_size": 128_256}
#: Configurations of real models' sizes, by name.
SHAPES: dict[str, PreTrainedConfig] = {
    "llama-2-7b": LlamaConfig(**_LLAMA_2_7B),
    "llama-3-8b": LlamaConfig(**_LLAMA_2_7B | _LLAMA_3_8B),
    "gemma-2-9b": Gemma2Config(
        hidden_size=3_584,
        intermediate_size=14_336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        vocab_size=256_000,
    ),
}


def tiny_lm(
    family: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, gpus: int = 1, **changes: Any
) -> PackedLM:
    """Returns a tiny model of a family, with changed fields of its configuration, spread over some GPUs."""
    lm = lm_of(tiny_config(family, **changes), device, dtype)
    if gpus > 1:
        _spread(lm, gpus)
    return lm


def _spread(lm: PackedLM, gpus: int) -> None:
    """Places a model as accelerate does: layers in turn, the norm last, a head with the weights that it is tied to."""
    for index, layer in enumerate(lm.layers):
        _place(layer, index * gpus // lm.n_layers)
    _place(getattr(lm.backbone, lm.family.norm), gpus - 1)
    _place(lm.head, 0 if lm.config.tie_word_embeddings else gpus - 1)


def _place(module: nn.Module, gpu: int) -> None:
    module.to(f"cuda:{gpu}")
    add_hook_to_module(module, AlignDevicesHook(execution_device=gpu), append=True)


def llama_2_7b(layers: int = 32, **changes: Any) -> PackedLM:
    """Returns Llama-2-7B's shape in bfloat16, with fewer layers if that is enough."""
    config = LlamaConfig(**_LLAMA_2_7B | {"num_hidden_layers": layers} | changes)
    return lm_of(config, "cuda", torch.bfloat16)


def lm_of(config: PreTrainedConfig, device: str, dtype: torch.dtype) -> PackedLM:
    """Returns a frozen model of this configuration, with the engine's attention."""
    config._attn_implementation = IMPLEMENTATION
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    finally:
        torch.set_default_dtype(before)
    return PackedLM(model.requires_grad_(False).eval())


def quantized_lm(shape: str) -> PackedLM:
    """Returns a model of one of SHAPES in bfloat16 whose layers are stored in 4 bits, on the GPU from the start."""
    lm = lm_of(SHAPES[shape], "meta", torch.bfloat16)
    quantize_without_numbers(lm.layers)
    for module in lm.model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                module._parameters[name] = nn.Parameter(
                    torch.empty_like(tensor, device="cuda"), requires_grad=False
                )
        for name, tensor in module._buffers.items():
            if tensor is not None:
                module._buffers[name] = torch.empty_like(tensor, device="cuda")
    return PackedLM(lm.model)
