"""Keys and values of prompts' beginnings, kept for whoever repeats them: several questions about one passage, a fixed
instruction, the turns of a conversation.

Only what lies strictly left of the first intervened token is kept: keys and values from behind an intervention are
another model's (wrong by more than the scores' own spread, measured). Where an intervention acts on the first tokens
(`f` positions), what follows them is kept under that intervention's scale. A prompt is known by a chain of hashes, one
for every BLOCK tokens, that begins with its scope: who asks, which model, held in which way. So nothing is ever found
under another owner, model or scale.

Where all products and attention are heft_engine.cpu.amx', scores from a kept prefix are fresh ones to the bit;
elsewhere (other processors and families, DoRA unmerged) they agree to the rounding of the model's dtype.

It does NOT know models or requests. One thread at a time, but for `room`.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from heft_engine.config.train import parse_positions
from heft_engine.model.interventions import PlacedIntervention

#: Tokens that share one hash. What is kept ends at a multiple of it.
BLOCK = 8
#: A prefix shorter than this costs more in the keeping than in the computing.
LEAST_GAIN = 32


def reach(interventions: Iterable[PlacedIntervention], prompt: int, scale: float) -> tuple[int, Hashable]:
    """(tokens, key): how many first tokens of a prompt are free of interventions that a shorter or longer prompt with
    the same beginning would not have; the key says what else their keys and values depend on.

    The last token is never among them: the answer is read from it.
    """
    end, firsts = prompt - 1, []
    for placed in interventions if scale else ():
        first, last = parse_positions(placed.positions)
        firsts.append(min(first, prompt // 2))
        end = min(end, prompt - min(last, prompt // 2))
    return end, (scale, tuple(firsts)) if any(firsts) else None


def chain(scope: Hashable, tokens: Sequence[int], end: int) -> list[bytes]:
    """One hash for every whole block of tokens[:end], each over all that stands before it and the scope."""
    digest = hashlib.blake2b(repr(scope).encode(), digest_size=16).digest()
    hashes = []
    for start in range(0, end - BLOCK + 1, BLOCK):
        block = repr(tokens[start : start + BLOCK]).encode()
        digest = hashlib.blake2b(digest + block, digest_size=16).digest()
        hashes.append(digest)
    return hashes


@dataclass(eq=False)
class _Span:
    """What one pass left: keys and values of the tokens from `start` on, (layers, 2, kv_heads, tokens, head_dim)."""

    scope: Hashable
    hashes: list[bytes]
    start: int
    tensor: Tensor
    parent: _Span | None
    children: int = field(default=0)

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


class CachedPrefix:
    """The first `length` tokens of a prompt. See `packing.Kept`."""

    def __init__(self, pieces: tuple[Tensor, ...], last: _Span) -> None:
        self._pieces = pieces
        self.last = last
        self.length = sum(piece.shape[3] for piece in pieces)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CachedPrefix) and (other.last, other.length) == (self.last, self.length)

    def __hash__(self) -> int:
        return hash((id(self.last), self.length))

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        parts = [piece[layer] for piece in self._pieces]
        both = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return both[:1], both[1:]


class PrefixCache:
    """Cached prefixes within `budget_bytes`, the longest unused dropped first."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.held_bytes = 0
        self._where: dict[bytes, tuple[_Span, int]] = {}
        self._used: OrderedDict[_Span, None] = OrderedDict()
        self._room = threading.Lock()  #: Lanes of one pass make room side by side; all else is one thread's.

    def find(self, hashes: Sequence[bytes]) -> CachedPrefix | None:
        """The longest kept beginning of a prompt, if there is one worth taking."""
        for count in range(len(hashes), 0, -1):
            found = self._where.get(hashes[count - 1])
            if found is not None:
                return self._prefix(*found) if count * BLOCK >= LEAST_GAIN else None
        return None

    def _prefix(self, span: _Span, end: int) -> CachedPrefix:
        pieces, last = [], span
        walk: _Span | None = span
        while walk is not None:
            # Those that others stand on are used after them, and so dropped after them.
            self._used.move_to_end(walk)
            pieces.append(walk.tensor[:, :, :, : end - walk.start])
            end, walk = walk.start, walk.parent
        return CachedPrefix(tuple(reversed(pieces)), last)

    def room(
        self, scope: Hashable, hashes: Sequence[bytes], kept: CachedPrefix | None, like: Tensor, layers: int
    ) -> PrefixWriter | None:
        """Where a pass may leave what it computes of a prompt beyond `kept`; None when nothing is worth keeping.

        `like`: (1, kv_heads, tokens, head_dim), keys of one layer.
        """
        start = kept.length if kept is not None else 0
        tokens = len(hashes) * BLOCK - start
        if tokens < BLOCK or len(hashes) * BLOCK < LEAST_GAIN:
            return None
        shape = (layers, 2, like.shape[1], tokens, like.shape[3])
        size = torch.Size(shape).numel() * like.element_size()
        if size > self.budget_bytes:
            return None
        with self._room:
            self._make_room(size, standing=kept.last if kept is not None else None)
            if self.held_bytes + size > self.budget_bytes:
                return None
        span = _Span(
            scope=scope,
            hashes=list(hashes[start // BLOCK :]),
            start=start,
            tensor=torch.empty(shape, dtype=like.dtype, device=like.device),
            parent=kept.last if kept is not None else None,
        )
        return PrefixWriter(self, span)

    def take_in(self, span: _Span) -> None:
        """Makes what a pass has left findable."""
        if all(digest in self._where for digest in span.hashes):
            return  # another row of the pass left the same
        if span.parent is not None and span.parent not in self._used:
            return  # what it stands on had to go meanwhile
        for index, digest in enumerate(span.hashes):
            self._where.setdefault(digest, (span, span.start + (index + 1) * BLOCK))
        if span.parent is not None:
            span.parent.children += 1
        self._used[span] = None
        self.held_bytes += span.nbytes
        self._make_room(0, standing=span)

    def forget(self, scope: Hashable) -> None:
        """Drops all that was left under a scope: its model is gone."""
        for span in reversed([span for span in self._used if span.scope == scope]):
            self._drop(span)

    def _make_room(self, size: int, *, standing: _Span | None) -> None:
        for span in list(self._used):
            if self.held_bytes + size <= self.budget_bytes:
                return
            if not span.children and span is not standing:
                self._drop(span)

    def _drop(self, span: _Span) -> None:
        del self._used[span]
        for digest in span.hashes:
            if self._where.get(digest, (None, 0))[0] is span:
                del self._where[digest]
        if span.parent is not None:
            span.parent.children -= 1
        self.held_bytes -= span.nbytes


class PrefixWriter:
    """Filled layer by layer while a pass runs; found by others once it is whole."""

    def __init__(self, cache: PrefixCache, span: _Span) -> None:
        self._cache = cache
        self._span = span

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """A row's own keys and values of one layer, (1, kv_heads, tokens, head_dim) each."""
        tokens = self._span.tensor.shape[3]
        self._span.tensor[layer, 0] = keys[0, :, :tokens]
        self._span.tensor[layer, 1] = values[0, :, :tokens]

    def close(self) -> None:
        """What is no number stays with the row that left it: it may come from a token behind these."""
        if self._span.tensor.isfinite().all():
            self._cache.take_in(self._span)
