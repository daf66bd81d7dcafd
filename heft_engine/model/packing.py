"""Packs examples into batches of one flat row of tokens (heft_engine.model.layout)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from heft_engine.data.encoding import Example
from heft_engine.model.layout import Layout, PackedRow
from heft_engine.runtime.transfers import to_device

#: The shortest and longest step between the lengths that passes are filled up to.
_STEPS = (16, 64)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """T tokens and what is read from them.

    input_ids, position_ids: int64, shape (T,); positions restart with each row and are absolute inside it.
    reads: for each example and answer, the flat positions whose logits predict that answer's tokens.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: Layout
    reads: tuple[tuple[tuple[int, ...], ...], ...]
    examples: tuple[Example, ...]

    @property
    def tokens(self) -> int:
        return len(self.input_ids)

    def inputs(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ids and positions on a device, (1, T) each."""
        return to_device(self.input_ids, device)[None], to_device(self.position_ids, device)[None]

    def supervised(self) -> tuple[list[int], list[int]]:
        """Flat positions to read, and the token that each must predict, over all answers."""
        positions = [p for example in self.reads for answer in example for p in answer]
        targets = [token for example in self.examples for answer in example.answers for token in answer]
        return positions, targets


def packed_length(example: Example) -> int:
    return len(example.prompt) + sum(max(0, len(answer) - 1) for answer in example.answers)


def fill(device: torch.device, tokens: int) -> int:
    """The tokens that a pass of so many runs: on a CPU it is filled up to one of few lengths."""
    return filled_length(tokens) if device.type == "cpu" else tokens


def filled_length(tokens: int) -> int:
    """The next of the lengths that passes have: eight to a power of two, more in long ones.

    On a CPU the library makes machine code for every new length of a pass, 13 MB for SmolLM2, and keeps it in the
    midst of the memory that the next pass needs: passes of ever new lengths took half a gigabyte in forty steps.
    """
    octave = 1 << max(0, tokens.bit_length() - 1)
    step = max(_STEPS[0], min(_STEPS[1], octave // 8), octave // 32)
    return -(-tokens // step) * step


def pack(
    examples: Sequence[Example],
    *,
    scale: float = 1.0,
    cached_tokens: Sequence[int] | None = None,
    length: int | None = None,
) -> Batch:
    """Lays examples end to end, all their answers as branches. The first `cached_tokens[i]` prompt tokens are left out.

    `length`: a row that nobody reads fills the batch up to so many tokens.
    """
    ids: list[int] = []
    positions: list[int] = []
    rows: list[PackedRow] = []
    reads: list[tuple[tuple[int, ...], ...]] = []
    for example, left_out in zip(examples, cached_tokens or (0,) * len(examples), strict=True):
        start, prompt = len(ids), len(example.prompt)
        ids += example.prompt[left_out:]
        positions += range(left_out, prompt)
        end = start + prompt - left_out
        read: list[tuple[int, ...]] = []
        for answer in example.answers:
            at = len(ids)
            fed = answer[:-1]
            ids += fed
            positions += range(prompt, prompt + len(fed))
            read.append((end - 1, *range(at, at + len(fed))) if answer else ())
        branches = tuple(len(answer) - 1 for answer in example.answers if len(answer) > 1)
        rows.append(PackedRow(start=start, prompt=prompt, branches=branches, cached_tokens=left_out))
        reads.append(tuple(read))
    if length is not None and len(ids) < length:
        filler = length - len(ids)
        rows.append(PackedRow(start=len(ids), prompt=filler, branches=()))
        ids += [0] * filler
        positions += range(filler)
    return Batch(
        input_ids=torch.tensor(ids, dtype=torch.long),
        position_ids=torch.tensor(positions, dtype=torch.long),
        layout=Layout(rows=tuple(rows), scale=scale),
        reads=tuple(reads),
        examples=tuple(examples),
    )


def micro_batches(examples: Sequence[Example], token_budget: int) -> Iterator[Sequence[Example]]:
    """Cuts a step into runs of at most `token_budget` tokens, in order; a longer row goes alone."""
    start, tokens = 0, 0
    for end, example in enumerate(examples):
        length = packed_length(example)
        if end > start and tokens + length > token_budget:
            yield examples[start:end]
            start, tokens = end, 0
        tokens += length
    if start < len(examples):
        yield examples[start:]
