"""The layout of a packed batch: rows end to end without padding, and what attention and adapters need to know of them.

A packed row is a prompt and, behind it, branches: alternative answers that each continue the prompt and don't see
one another. A training row has one branch, which makes it an ordinary causal sequence. The last token of a branch is
never fed in: nothing is predicted from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from heft_engine.data.encoding import intervened_positions
from heft_engine.runtime.transfers import index_tensor, to_device

#: Tokens of rows that attend together to a prefix of theirs: each also sees, and leaves out, the others' tokens.
GROUP_TOKENS = 160


class AttentionOptions(NamedTuple):
    """Options of a layer's attention: scores are multiplied by `scaling` (None: 1/√head_dim) and capped at ±`softcap`.

    Those of the last `window` positions count.
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True)
class PackedRow:
    """The place of one row: `start` in the flat batch, then `prompt` tokens, then `branches` of these lengths.

    Of a row that continues a cache, the first `cached_tokens` prompt tokens are not in the batch: attention finds their
    keys and values in the layout's `prefix`, and positions go on counting from the row's true start. Of a row that
    only fills a cache, the last `unread_tokens` prompt tokens are not in the batch.
    """

    start: int
    prompt: int
    branches: tuple[int, ...]
    cached_tokens: int = 0
    unread_tokens: int = 0

    @property
    def prompt_length(self) -> int:
        """The prompt's tokens in the batch."""
        return self.prompt - self.cached_tokens - self.unread_tokens

    @property
    def length(self) -> int:
        """Tokens in the batch."""
        return self.prompt_length + sum(self.branches)

    @property
    def segments(self) -> tuple[int, ...]:
        """Lengths of the causal sequences in the batch: the prompt and each of several branches, or all as one."""
        return (self.length,) if len(self.branches) < 2 else (self.prompt_length, *self.branches)


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
    """One row's adapter, beside the base that all rows share: see `heft_engine.serving.row_adapters`."""

    def touches(self, module: str) -> bool:
        """Returns True if `linear` changes this layer's output."""

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
        """Returns itself, as functions do: a copied model shares the hooks."""
        return self


class DecodeStep(Protocol):
    """Attends one new token a row to all that is kept of the row."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """query (1, heads, rows, head_dim), key and value (1, kv_heads, rows, head_dim), rotated.

        Returns (1, rows, heads, head_dim).
        """


@dataclass(frozen=True, kw_only=True)
class AttentionGroup:
    """Rows first … end − 1 of a batch, which attend in one call: one row, or neighbours that continue one prefix."""

    first: int
    end: int


@dataclass(frozen=True, kw_only=True)
class PaddedPrefix:
    """Keys and values left of a batch of suffixes, padded to the longest.

    keys_values: (layers, 2, rows, kv_heads, P, head_dim), `first_layer` being the first. lengths: of each row, ≤ P.
    `rows` are the suffixes, each one causal sequence.
    """

    first_layer: int
    keys_values: Tensor
    lengths: tuple[int, ...]
    rows: tuple[PackedRow, ...]
    _biases: dict[int | None, Tensor] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(
        first_layer: int, kept: Sequence[Tensor], rows: tuple[PackedRow, ...], device: torch.device
    ) -> PaddedPrefix:
        """From one tensor a row, (layers, 2, kv_heads, length, head_dim)."""
        lengths = tuple(each.shape[3] for each in kept)
        layers, two, heads, _, width = kept[0].shape
        # Put together where they are and copied once, from pinned memory: the host does not wait for a GPU.
        padded = torch.zeros(
            (layers, two, len(kept), heads, max(lengths), width),
            dtype=kept[0].dtype,
            device=kept[0].device,
            pin_memory=device.type == "cuda" and kept[0].device.type == "cpu",
        )
        for index, (each, length) in enumerate(zip(kept, lengths, strict=True)):
            padded[:, :, index, :, :length] = each
        keys_values = padded.to(device, non_blocking=True)
        return PaddedPrefix(first_layer=first_layer, keys_values=keys_values, lengths=lengths, rows=rows)

    @cached_property
    def longest(self) -> int:
        """S: tokens of the longest suffix."""
        return max(row.length for row in self.rows)

    @cached_property
    def is_even(self) -> bool:
        """True if all suffixes are as long, so that the flat batch is the padded one."""
        return all(row.length == self.longest for row in self.rows)

    @cached_property
    def padded_index(self) -> Tensor:
        """(rows, S): where each row's tokens lie in the flat batch; padding points at the row's first token."""
        device = self.keys_values.device
        starts = index_tensor([row.start for row in self.rows], device)
        lengths = index_tensor([row.length for row in self.rows], device)
        offsets = torch.arange(self.longest, device=device)
        return starts[:, None] + torch.where(offsets[None] < lengths[:, None], offsets[None], 0)

    @cached_property
    def flat_index(self) -> Tensor:
        """(T,): where each flat token lies in (rows · S)."""
        places = [torch.arange(row.length) + index * self.longest for index, row in enumerate(self.rows)]
        return to_device(torch.cat(places), self.keys_values.device)

    def bias(self, window: int | None, device: torch.device) -> Tensor:
        """(rows, 1, S, P + S), float32: 0 where a suffix token may look, −∞ elsewhere. Windows count positions."""
        if window not in self._biases:
            self._biases[window] = self._new_bias(window, device)
        return self._biases[window].to(device)

    def _new_bias(self, window: int | None, device: torch.device) -> Tensor:
        before = index_tensor(self.lengths, device)[:, None]
        lengths = index_tensor([row.length for row in self.rows], device)[:, None]
        prefix = torch.arange(self.keys_values.shape[4], device=device)[None]
        suffix = torch.arange(self.longest, device=device)[None]
        exists = torch.cat([prefix < before, suffix < lengths], dim=1)  # (rows, P + S)
        position = torch.cat([prefix.expand(len(self.rows), -1), before + suffix], dim=1)
        query = (before + suffix)[:, :, None]
        seen = exists[:, None, :] & (position[:, None, :] <= query)
        if window is not None:
            seen &= position[:, None, :] > query - window
        # A padded query must see something: the softmax of nothing is no number.
        seen |= (suffix >= lengths)[:, :, None]
        return torch.zeros(seen.shape, device=device).masked_fill_(~seen, float("-inf"))[:, None]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The structure of a flat batch of T tokens, for attention and interventions."""

    rows: tuple[PackedRow, ...]
    #: s in h + s·(Φ(h) − h); 0 leaves interventions out altogether.
    scale: float = 1.0
    #: A scale for each row, in place of `scale`.
    scales: tuple[float, ...] | None = None
    #: Keys and values left of the rows, all of which have one branch at most.
    prefix: PaddedPrefix | None = None
    kv_sink: KVSink | None = None
    #: For each row that continues a cache of its own, what is left of it.
    cached_prefixes: tuple[PrefixKV | None, ...] | None = None
    #: For each row, what its model adds to the base; None where that is nothing.
    adapters: tuple[RowAdapter | None, ...] | None = None
    #: Every row is one token that comes after its prompt.
    decoding: DecodeStep | None = None
    #: What attention keeps from layer to layer: masks and tables are the same for all of them. A layout that is made
    #: of this one begins with none.
    memo: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @cached_property
    def groups(self) -> tuple[AttentionGroup, ...]:
        """All rows, in order. Neighbours that continue the same prefix make one group, up to GROUP_TOKENS tokens."""
        starts: list[int] = []
        tokens = 0
        for index, row in enumerate(self.rows):
            if not starts or not self._joins_group(index) or tokens + row.length > GROUP_TOKENS:
                starts.append(index)
                tokens = 0
            tokens += row.length
        ends = [*starts[1:], len(self.rows)]
        return tuple(AttentionGroup(first=first, end=end) for first, end in zip(starts, ends, strict=True))

    def _joins_group(self, index: int) -> bool:
        """Returns True if a row and the one before it continue the same prefix, each as one causal sequence."""
        if self.cached_prefixes is None or index == 0 or self.cached_prefixes[index] is None:
            return False
        return self.cached_prefixes[index] == self.cached_prefixes[index - 1] and all(
            len(self.rows[neighbour].branches) < 2 for neighbour in (index - 1, index)
        )

    def intervened(self, first: int, last: int) -> list[int]:
        """Flat indices of every intervened token, row by row."""
        return [index for indices in self.intervened_by_row(first, last) for index in indices]

    def intervened_by_row(self, first: int, last: int) -> list[list[int]]:
        """The same, a list for each row."""
        return [self._intervened(row, first, last) for row in self.rows]

    @staticmethod
    def _intervened(row: PackedRow, first: int, last: int) -> list[int]:
        if row.cached_tokens >= row.prompt:
            return []
        return [
            row.start + position - row.cached_tokens
            for position in intervened_positions(row.prompt, first, last)
            if row.cached_tokens <= position < row.prompt - row.unread_tokens
        ]
