"""Greedy answers for text tasks: a packed prefill with the intervention, then plain decoding on the cache.

The intervention acts on prompt tokens alone, so a decoded token costs what it costs the plain model. It does NOT know
rows or tokenizers.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache

from heft_engine.encoding import Example
from heft_engine.model import PackedLM
from heft_engine.packing import pack


@torch.inference_mode()
def generate(
    lm: PackedLM, prompt: Example, *, eos: int, max_new_tokens: int, scale: float = 1.0
) -> list[int]:
    """The most likely continuation of a prompt, token by token, up to `eos` (left out) or `max_new_tokens`."""
    bare = Example(prompt=prompt.prompt, answers=(), labels=(), gold=None)
    batch = pack([bare], scale=scale)
    # A cache made from the config is cut to the window and can't be continued; this one keeps every token.
    cache = DynamicCache()
    states = lm.embed(batch.input_ids.to(lm.device)[None])
    positions = batch.position_ids.to(lm.device)[None]
    states = lm.run_layers(states, positions, batch.layout, 0, lm.n_layers, cache)
    tokens: list[int] = []
    while len(tokens) < max_new_tokens:
        token = int(lm.logits(lm.finish(states[:, -1:])[0])[0].argmax())
        if token == eos:
            break
        tokens.append(token)
        positions = torch.tensor([[len(prompt.prompt) + len(tokens) - 1]], device=lm.device)
        states = lm.embed(torch.tensor([[token]], device=lm.device))
        states = lm.run_layers(states, positions, None, 0, lm.n_layers, cache)
    return tokens
