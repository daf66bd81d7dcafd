"""The one layout: rows end to end without padding.

A packed row is a prompt and, behind it, branches: alternative answers that each continue the prompt and don't see
one another. A training row has one branch, which makes it an ordinary causal sequence. The last token of a branch is
never fed in: nothing is predicted from it.

It does NOT know attention or models: `heft_engine.model.attention` reads the layout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from heft_engine.data.encoding import Example, intervened_positions

if TYPE_CHECKING:
    from heft_engine.model.prefix_attention import Prefix

#: Tokens of rows that attend together to a prefix of theirs: each also sees, and leaves out, the others' tokens.
TOGETHER = 160
#: What a row is filled up to for attention on a CPU: torch takes up to twice as long for 158 tokens as for 160.
TILE = 32
#: The shortest and longest step between the lengths that passes are filled up to.
_STEPS = (16, 64)


@dataclass(frozen=True, kw_only=True)
class PackedRow:
    """Where one row lies: `start` in the flat batch, then `prompt` tokens, then `branches` of these lengths.

    Of a row that continues a cache, the first `skipped` prompt tokens are not in the batch: attention finds their
    keys and values in the layout's `prefix`, and positions go on counting from the row's true start. Of a row that
    only fills a cache, the last `missing` prompt tokens are not in the batch.
    """

    start: int
    prompt: int
    branches: tuple[int, ...]
    skipped: int = 0
    missing: int = 0

    @property
    def prompt_length(self) -> int:
        """The prompt's tokens in the batch."""
        return self.prompt - self.skipped - self.missing

    @property
    def length(self) -> int:
        """Tokens in the batch."""
        return self.prompt_length + sum(self.branches)


class KVSink(Protocol):
    """Keeps keys and values that a batch leaves behind."""

    def write(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        """Shown every row's own keys and values, (1, kv_heads, length, head_dim) each, rotated.

        Of a row with several branches, those of its prompt.
        """


class PrefixKV(Protocol):
    """Keys and values left of a row's first token in the batch, of every layer. Equal ones are the same tokens'."""

    @property
    def length(self) -> int:
        """Tokens."""

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """(1, kv_heads, length, head_dim) each, rotated."""


class RowAdapter(Protocol):
    """What one row's model adds to the base that all rows share: see `heft_engine.serving.row_adapters`."""

    def touches(self, module: str) -> bool:
        """Whether `linear` does anything to this layer."""

    def factors(self, module: str) -> Sequence[tuple[Tensor, Tensor, int]] | None:
        """All that `linear` does to a layer it touches, where that is to add (x · downᵀ) · up: pairs down
        (n, rank, in), up (n, rank, out), finite, of which those at an index are meant. None where it does more."""

    def linear(self, module: str, x: Tensor, y: Tensor, bias: Tensor | None) -> None:
        """Turns one linear layer's y (n, out) for x (n, in) into the adapted one's, in place."""

    def intervene(self, layer: int, hidden: Tensor, row: PackedRow, scale: float) -> None:
        """Edits one layer's output (row.length, hidden) at the row's intervened tokens, in place."""


class AdapterHook(ABC):
    """A linear layer's forward hook that sees to `Layout.adapters`, and does nothing in passes without them."""

    #: The layer's, as adapters know it.
    name: str

    @abstractmethod
    def adapt(
        self, rows: Sequence[tuple[PackedRow, RowAdapter]], module: nn.Linear, x: Tensor, y: Tensor
    ) -> None:
        """Turns the layer's y (…, out) for x (…, in) into the adapted one's at these rows, in place."""

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterHook:
        """As functions, a copied model's hooks are those of the model."""
        return self


class Decoding(Protocol):
    """Attends one new token a row to all that is kept of the row."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """query (1, heads, rows, head_dim), key and value (1, kv_heads, rows, head_dim), rotated.

        Returns (1, rows, heads, head_dim).
        """


@dataclass(frozen=True, kw_only=True)
class Run:
    """Rows first … end − 1 of a batch, one behind the other, that attention takes in one go: one row, or several that
    continue the same prefix."""

    first: int
    end: int


@dataclass(frozen=True)
class Tiles:
    """Rows of a batch, each filled up to whole tiles of a CPU's matrix units, those of one length beside each other.

    starts: of each row, in their order in the batch. groups: (start, rows, tokens of a row), one behind the other.
    places, gaps: where each token of the batch stands, and where nothing does; int64.
    """

    starts: tuple[int, ...]
    groups: tuple[tuple[int, int, int], ...]
    places: Tensor
    gaps: Tensor

    @staticmethod
    def of(lengths: Sequence[int]) -> Tiles:
        filled = [-(-length // TILE) * TILE for length in lengths]
        starts, groups, reached = [0] * len(lengths), [], 0
        for size in sorted(set(filled)):
            members = [row for row, length in enumerate(filled) if length == size]
            groups.append((reached, len(members), size))
            for row in members:
                starts[row] = reached
                reached += size
        places = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        is_gap = torch.ones(reached, dtype=torch.bool)
        is_gap[torch.cat(places)] = False
        return Tiles(tuple(starts), tuple(groups), torch.cat(places), is_gap.nonzero()[:, 0])


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What attention and interventions need to know of a flat batch of T tokens."""

    rows: tuple[PackedRow, ...]
    #: s in h + s·(Φ(h) − h); 0 leaves interventions out altogether.
    scale: float = 1.0
    #: A scale for each row, in place of `scale`.
    scales: tuple[float, ...] | None = None
    #: Keys and values left of the rows, all of which have one branch at most.
    prefix: Prefix | None = None
    kv_sink: KVSink | None = None
    #: For each row that continues a cache of its own, what is left of it.
    cached_prefixes: tuple[PrefixKV | None, ...] | None = None
    #: For each row, what its model adds to the base; None where that is nothing.
    adapters: tuple[RowAdapter | None, ...] | None = None
    #: Every row is one token that comes after its prompt.
    decoding: Decoding | None = None
    #: What attention keeps from layer to layer: masks and tables are the same for all of them. A layout that is made
    #: of this one begins with none.
    memo: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """All rows, in order. Neighbours that continue the same prefix make one run, up to TOGETHER tokens."""
        starts: list[int] = []
        tokens = 0
        for index, row in enumerate(self.rows):
            if not starts or not self._go_on(index) or tokens + row.length > TOGETHER:
                starts.append(index)
                tokens = 0
            tokens += row.length
        ends = [*starts[1:], len(self.rows)]
        return tuple(Run(first=first, end=end) for first, end in zip(starts, ends, strict=True))

    @cached_property
    def in_order(self) -> tuple[Tensor, Tensor]:
        """Places of the batch's tokens, and no gaps, where they are not to stand otherwise."""
        places = torch.arange(sum(row.length for row in self.rows))
        return places, places[:0]

    @cached_property
    def tiles(self) -> Tiles | None:
        """Where every row is one causal sequence that continues nothing; None otherwise."""
        is_plain = self.cached_prefixes is None and self.prefix is None and self.decoding is None
        if not is_plain or any(len(row.branches) > 1 or not row.length for row in self.rows):
            return None
        return Tiles.of([row.length for row in self.rows])

    def _go_on(self, index: int) -> bool:
        """Whether a row continues the prefix that the row before it continues; both are one causal sequence each."""
        if self.cached_prefixes is None or index == 0 or self.cached_prefixes[index] is None:
            return False
        return self.cached_prefixes[index] == self.cached_prefixes[index - 1] and all(
            len(self.rows[one].branches) < 2 for one in (index - 1, index)
        )

    def intervened(self, first: int, last: int) -> list[int]:
        """Flat indices of every intervened token, row by row."""
        return [index for indices in self.intervened_by_row(first, last) for index in indices]

    def intervened_by_row(self, first: int, last: int) -> list[list[int]]:
        """The same, a list for each row."""
        return [self._intervened(row, first, last) for row in self.rows]

    @staticmethod
    def _intervened(row: PackedRow, first: int, last: int) -> list[int]:
        if row.skipped >= row.prompt:
            return []
        return [
            row.start + position - row.skipped
            for position in intervened_positions(row.prompt, first, last)
            if row.skipped <= position < row.prompt - row.missing
        ]


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
    skipped: Sequence[int] | None = None,
    length: int | None = None,
) -> Batch:
    """Lays examples end to end, all their answers as branches. The first `skipped[i]` prompt tokens are left out.

    `length`: a row that nobody reads fills the batch up to so many tokens.
    """
    ids: list[int] = []
    positions: list[int] = []
    rows: list[PackedRow] = []
    reads: list[tuple[tuple[int, ...], ...]] = []
    for example, left_out in zip(examples, skipped or (0,) * len(examples), strict=True):
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
        rows.append(PackedRow(start=start, prompt=prompt, branches=branches, skipped=left_out))
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
