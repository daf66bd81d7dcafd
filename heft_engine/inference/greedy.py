"""Greedy continuations of many prompts at once, as tokens: what evaluation compares."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

from heft_engine.data.chat_template import ChatTemplate
from heft_engine.data.encoding import Example
from heft_engine.inference.decode_batch import DecodeBatch, DecodeRequest
from heft_engine.inference.scheduler import DecodeScheduler
from heft_engine.model.packed_lm import PackedLM

#: Budget of the key/value cache; a sequence that needs more gets it, alone.
BUDGET_BYTES = 1024**3


def generate(
    lm: PackedLM,
    prompts: Sequence[Example],
    *,
    eos_tokens: Collection[int],
    max_new_tokens: Sequence[int],
    scale: float = 1.0,
    should_stop: Callable[[int, list[int]], bool] = lambda index, tokens: False,
) -> list[list[int]]:
    """Returns each prompt's most likely continuation, up to an EOS token (left out) or its `max_new_tokens`.

    `should_stop(index, tokens)` may end a prompt's continuation after any token.
    """
    continuations: list[list[int]] = [[] for _ in prompts]
    requests = [
        DecodeRequest(id=index, prompt=prompt.prompt, max_tokens=max_tokens, scale=scale)
        for index, (prompt, max_tokens) in enumerate(zip(prompts, max_new_tokens, strict=True))
        if max_tokens > 0
    ]
    empty = DecodeBatch(lm, budget_bytes=0)
    largest = max((empty.bytes_for(request) for request in requests), default=0)
    scheduler = DecodeScheduler(DecodeBatch(lm, budget_bytes=max(BUDGET_BYTES, largest)))
    scheduler.add(requests)
    while scheduler.is_busy:
        for request_id, sampled in scheduler.step().items():
            index = cast(int, request_id)
            tokens = continuations[index]
            is_eos = sampled.token in eos_tokens
            if not is_eos:
                tokens.append(sampled.token)
            if is_eos or len(tokens) == max_new_tokens[index] or should_stop(index, tokens):
                scheduler.abort(index)
    return continuations


def eos_token_ids(lm: PackedLM, chat: ChatTemplate) -> frozenset[int]:
    """Returns the tokens that end a text: the tokenizer's EOS, the chat template's end of a turn, and those of the
    model's generation config."""
    configured: Any = getattr(getattr(lm.model, "generation_config", None), "eos_token_id", None)
    eos: Sequence[int | None] = configured if isinstance(configured, list) else [configured]
    ends = (cast(int | None, chat.tokenizer.eos_token_id), chat.end_token, *eos)
    return frozenset(token for token in ends if token is not None)
