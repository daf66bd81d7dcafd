"""Models with random weights, made on the device: nothing is downloaded, and nothing is written to disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from heft_engine.data.encoding import Example
from heft_engine.errors import TrainingError
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.packed_lm import PackedLM

#: Of the GPU's free memory, for weights: the rest is for activations and caches.
WEIGHTS_SHARE = 0.6


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Llama."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int

    def config(self, layers: int | None = None) -> LlamaConfig:
        return LlamaConfig(
            num_hidden_layers=layers or self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=16_384,
            bos_token_id=0,
            eos_token_id=1,
        )

    def parameters(self) -> int:
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden


LLAMA_2_7B = Shape(layers=32, hidden=4_096, intermediate=11_008, heads=32, vocabulary=32_000)
#: Takes part for the large shape where the check itself is tried out, without a GPU.
SMALL = Shape(layers=3, hidden=64, intermediate=128, heads=4, vocabulary=1_000)

_TINY: dict[str, Any] = {
    "vocab_size": 1_000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "sliding_window": 16,
    "query_pre_attn_scalar": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def fitting(full: Shape, free_bytes: int) -> Shape:
    """Returns the shape with as many layers as fit in bfloat16 into WEIGHTS_SHARE of the bytes.

    Raises TrainingError (out_of_memory) where fewer than two layers fit.
    """
    for layers in range(full.layers, 1, -1):
        shape = replace(full, layers=layers)
        if 2 * shape.parameters() <= WEIGHTS_SHARE * free_bytes:
            return shape
    raise TrainingError("not even two layers of this shape fit on this GPU", code="out_of_memory")


def tiny_config(family: str) -> PretrainedConfig:
    """Returns the configuration of a tiny model of a family, with windows and soft caps where the family has them."""
    config: PretrainedConfig = AutoConfig.for_model(family, **_TINY)
    return config


def random_model(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> PackedLM:
    """Returns a frozen model with random weights, the same at each call for one device."""
    with torch.random.fork_rng(_cuda_devices(device)), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=IMPLEMENTATION)
    return PackedLM(model.requires_grad_(False).eval())


def random_examples(
    lengths: Sequence[int], vocabulary: int, *, answers: Sequence[int] = (1, 1), seed: int = 0
) -> list[Example]:
    """Returns examples with prompts of so many random tokens; `answers`: the number of tokens of each answer."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, vocabulary, (count,), generator=generator).tolist())

    labels = tuple(str(index) for index in range(len(answers)))
    return [
        Example(prompt=tokens(length), answers=tuple(map(tokens, answers)), labels=labels, gold=0)
        for length in lengths
    ]


def _cuda_devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []
