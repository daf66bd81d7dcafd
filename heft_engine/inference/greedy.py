"""Greedy answers to many prompts at once, as tokens: what evaluation compares and tests hold to the plain model.

It does NOT know rows; text is written by `heft_engine.serving.text_generator`, on the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from heft_engine.data.encoding import Example
from heft_engine.inference.decode_batch import DecodeBatch, DecodeRequest
from heft_engine.inference.scheduler import DecodeScheduler
from heft_engine.model.packed_lm import PackedLM

#: What keys and values of the sequences that are written at a time may hold; a longer sequence is written alone.
BUDGET_BYTES = 1024**3


def generate(
    lm: PackedLM,
    prompts: Sequence[Example],
    *,
    ends: Collection[int],
    max_new_tokens: Sequence[int],
    scale: float = 1.0,
    is_enough: Callable[[int, list[int]], bool] = lambda index, tokens: False,
) -> list[list[int]]:
    """The most likely continuation of each prompt, up to one of `ends` (left out) or its own number of tokens.

    `is_enough` hears what a prompt's continuation is so far, and may end it.
    """
    written: list[list[int]] = [[] for _ in prompts]
    requests = [
        DecodeRequest(id=index, prompt=prompt.prompt, max_tokens=budget, scale=scale)
        for index, (prompt, budget) in enumerate(zip(prompts, max_new_tokens, strict=True))
        if budget > 0
    ]
    batch = DecodeBatch(lm, budget_bytes=BUDGET_BYTES)
    longest = max((batch.bytes_for(request) for request in requests), default=0)
    scheduler = DecodeScheduler(DecodeBatch(lm, budget_bytes=max(BUDGET_BYTES, longest)))
    scheduler.add(requests)
    while scheduler.is_busy:
        for new in scheduler.step():
            index, token = int(str(new.id)), new.choice.token
            if token not in ends:
                written[index].append(token)
            full = len(written[index]) == max_new_tokens[index]
            if token in ends or full or is_enough(index, written[index]):
                scheduler.abort(index)
    return written


def eos_token_ids(lm: PackedLM, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's EOS, and those that the model was published with: chat models end a
    turn with a token of their own."""
    published: Any = getattr(getattr(lm.model, "generation_config", None), "eos_token_id", None)
    own = cast(int | None, tokenizer.eos_token_id)
    ends: Sequence[int | None] = published if isinstance(published, list) else [published]
    return frozenset(token for token in (own, *ends) if token is not None)
