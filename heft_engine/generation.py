"""Greedy answers to many prompts at once, as tokens: what evaluation compares and tests hold to the plain model.

It does NOT know rows or tokenizers; text is written by `heft_engine.serving.writing`, on the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from heft_engine.encoding import Example
from heft_engine.model import PackedLM
from heft_engine.serving.admission import DecodeQueue
from heft_engine.serving.decoding import DecodeBatch, DecodeRequest

#: What keys and values of the sequences that are written at a time may hold; a longer sequence is written alone.
BUDGET_BYTES = 1024**3


def generate(
    lm: PackedLM,
    prompts: Sequence[Example],
    *,
    eos: int,
    max_new_tokens: Sequence[int],
    scale: float = 1.0,
    is_enough: Callable[[int, list[int]], bool] = lambda index, tokens: False,
) -> list[list[int]]:
    """The most likely continuation of each prompt, up to `eos` (left out) or its own number of tokens.

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
    queue = DecodeQueue(DecodeBatch(lm, budget_bytes=max(BUDGET_BYTES, longest)))
    queue.add(requests)
    while queue.is_busy:
        for new in queue.turn():
            index, token = int(str(new.id)), new.choice.token
            if token != eos:
                written[index].append(token)
            full = len(written[index]) == max_new_tokens[index]
            if token == eos or full or is_enough(index, written[index]):
                queue.drop(index)
    return written
