"""Model families and what differs between them: the names of their parts, and how logits leave them.

One table, closed: a family that is not in it is refused rather than half understood.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from heft_engine.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names inside one `…ForCausalLM`. `attention` are the projections LoRA adapts by default: query and value."""

    backbone: str = "model"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    attention: tuple[str, ...] = ("q_proj", "v_proj")
    #: Rotary embeddings differ between sliding and full layers (Gemma 3).
    rotary_by_layer_type: bool = False
    #: Whether `num_key_value_heads` counts; otherwise every query head has keys and values of its own.
    grouped_heads: bool = True
    #: False: hidden states exceed 65,504, float16's largest number, so "auto" is never float16.
    fits_float16: bool = True


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma": Family(fits_float16=False),
    "gemma2": Family(fits_float16=False),
    "gemma3_text": Family(rotary_by_layer_type=True, fits_float16=False),
    # One fused projection holds query, key and value.
    "gpt_neox": Family(
        backbone="gpt_neox",
        embedding="embed_in",
        norm="final_layer_norm",
        attention=("query_key_value",),
        grouped_heads=False,
    ),
}


def family_of(config: Any) -> Family:
    """The family of a transformers config. Raises ModelError naming those that are known."""
    try:
        return FAMILIES[config.model_type]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        message = f"model type {config.model_type!r} is not supported; supported are {known}"
        raise ModelError(message, param="model", code="unsupported_model") from None
