"""Prefix cache: keys and values of prompts' beginnings, reused by later prompts that begin alike.

Prompts about one passage, with one instruction or of one conversation share a prefix. A prompt is cached as a chain of
hashes, one for every BLOCK_TOKENS tokens, each over all tokens before it and a scope: the owner, the model variant and
what else its keys and values depend on. Nothing is found under another owner, model or scale.

Only tokens left of the first intervened one are cached: keys and values behind an intervention depend on where the
prompt ends. Where interventions act on first tokens (`f` positions), what follows is cached under their scale.

With heft_engine.cpu.amx, scores from a cached prefix have the bits of fresh ones; elsewhere (other processors and model
families, DoRA unmerged) they agree to the rounding of the model's dtype.

Not thread-safe, but for `PrefixCache.reserve`.
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
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.model.interventions import PlacedIntervention

#: Tokens of one hash; cached prefixes end at multiples of it.
BLOCK_TOKENS = 8
#: Shorter prefixes cost more to cache than to compute.
MIN_PREFIX_TOKENS = 32


def prefix_hashes(
    variant: ModelVariant, prompt: Sequence[int], *, scale: float, owner: Hashable
) -> list[bytes]:
    """Returns the block hashes of what can be reused of a prompt; none for a variant without a scope."""
    if variant.scope is None:
        return []
    tokens, key = reusable_prefix(variant.interventions, len(prompt), scale)
    return block_hashes((owner, variant.scope, key), prompt, tokens)


def reusable_prefix(
    interventions: Iterable[PlacedIntervention], prompt_tokens: int, scale: float
) -> tuple[int, Hashable]:
    """Returns (tokens, key): the length of a prompt's reusable prefix, and what its keys and values depend on.

    Reusable are tokens at which any prompt with the same beginning has the same interventions, whatever its length. The
    last token never is: the answer is read from it.
    """
    end, first_counts = prompt_tokens - 1, []
    for placed in interventions if scale else ():
        first, last = parse_positions(placed.positions)
        first_counts.append(min(first, prompt_tokens // 2))
        end = min(end, prompt_tokens - min(last, prompt_tokens // 2))
    return end, (scale, tuple(first_counts)) if any(first_counts) else None


def block_hashes(scope: Hashable, tokens: Sequence[int], end: int) -> list[bytes]:
    """Returns a hash for every whole block of tokens[:end], each over the scope and all tokens up to its end."""
    digest = hashlib.blake2b(repr(scope).encode(), digest_size=16).digest()
    hashes = []
    for start in range(0, end - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = repr(tokens[start : start + BLOCK_TOKENS]).encode()
        digest = hashlib.blake2b(digest + block, digest_size=16).digest()
        hashes.append(digest)
    return hashes


@dataclass(eq=False)
class _Segment:
    """Keys and values that one pass computed, from token `start` on: (layers, 2, kv_heads, tokens, head_dim).

    What lies left of `start` is in `parent`, whose `children` count segments like this one.
    """

    scope: Hashable
    hashes: list[bytes]
    start: int
    tensor: Tensor
    parent: _Segment | None
    children: int = field(default=0)

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


class CachedPrefix:
    """The first `length` tokens of a prompt. Implements `packing.PrefixKV`."""

    def __init__(self, tensors: tuple[Tensor, ...], segment: _Segment) -> None:
        self._tensors = tensors
        self.segment = segment
        self.length = sum(tensor.shape[3] for tensor in tensors)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CachedPrefix) and (other.segment, other.length) == (
            self.segment,
            self.length,
        )

    def __hash__(self) -> int:
        return hash((id(self.segment), self.length))

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        parts = [tensor[layer] for tensor in self._tensors]
        keys_values = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return keys_values[:1], keys_values[1:]


class PrefixCache:
    """Cached prefixes within `budget_bytes`; the least recently used are evicted."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        #: hash → segment and the block's end in the prompt
        self._blocks: dict[bytes, tuple[_Segment, int]] = {}
        self._segments: OrderedDict[_Segment, None] = OrderedDict()  #: least recently used first
        self._reserving = threading.Lock()  #: rows of one pass are computed on several threads

    def find(self, hashes: Sequence[bytes]) -> CachedPrefix | None:
        """Returns the longest cached prefix of a prompt with these block hashes."""
        for count in range(len(hashes), 0, -1):
            block = self._blocks.get(hashes[count - 1])
            if block is not None:
                return self._prefix(*block) if count * BLOCK_TOKENS >= MIN_PREFIX_TOKENS else None
        return None

    def _prefix(self, segment: _Segment, end: int) -> CachedPrefix:
        tensors = []
        part: _Segment | None = segment
        while part is not None:
            # Parents are marked as used after their children, and so evicted after them.
            self._segments.move_to_end(part)
            tensors.append(part.tensor[:, :, :, : end - part.start])
            end, part = part.start, part.parent
        return CachedPrefix(tuple(reversed(tensors)), segment)

    def reserve(
        self, scope: Hashable, hashes: Sequence[bytes], prefix: CachedPrefix | None, keys: Tensor, layers: int
    ) -> PrefixWriter | None:
        """Returns a writer for what a pass computes of a prompt beyond `prefix`; None where that is not worth caching.

        `keys`: the row's keys of one layer, (1, kv_heads, tokens, head_dim), for shape and dtype. Thread-safe.
        """
        start = prefix.length if prefix is not None else 0
        parent = prefix.segment if prefix is not None else None
        end = len(hashes) * BLOCK_TOKENS
        if end - start < BLOCK_TOKENS or end < MIN_PREFIX_TOKENS:
            return None
        shape = (layers, 2, keys.shape[1], end - start, keys.shape[3])
        size = torch.Size(shape).numel() * keys.element_size()
        if size > self.budget_bytes:
            return None
        with self._reserving:
            self._evict(size, keep=parent)
            if self.used_bytes + size > self.budget_bytes:
                return None
        segment = _Segment(
            scope=scope,
            hashes=list(hashes[start // BLOCK_TOKENS :]),
            start=start,
            tensor=torch.empty(shape, dtype=keys.dtype, device=keys.device),
            parent=parent,
        )
        return PrefixWriter(self, segment)

    def insert(self, segment: _Segment) -> None:
        """Makes a segment findable, unless another row cached the same or its parent has been evicted."""
        if all(digest in self._blocks for digest in segment.hashes):
            return
        if segment.parent is not None and segment.parent not in self._segments:
            return
        for index, digest in enumerate(segment.hashes, 1):
            self._blocks.setdefault(digest, (segment, segment.start + index * BLOCK_TOKENS))
        if segment.parent is not None:
            segment.parent.children += 1
        self._segments[segment] = None
        self.used_bytes += segment.nbytes
        self._evict(0, keep=segment)

    def remove(self, scope: Hashable) -> None:
        """Removes all segments of a scope."""
        for segment in reversed([segment for segment in self._segments if segment.scope == scope]):
            self._remove(segment)

    def _evict(self, size: int, *, keep: _Segment | None) -> None:
        """Evicts segments without children until `size` more bytes fit."""
        for segment in list(self._segments):
            if self.used_bytes + size <= self.budget_bytes:
                return
            if not segment.children and segment is not keep:
                self._remove(segment)

    def _remove(self, segment: _Segment) -> None:
        del self._segments[segment]
        for digest in segment.hashes:
            if self._blocks.get(digest, (None, 0))[0] is segment:
                del self._blocks[digest]
        if segment.parent is not None:
            segment.parent.children -= 1
        self.used_bytes -= segment.nbytes


class PrefixWriter:
    """A new segment of the cache, written layer by layer while a pass runs and findable after `commit`."""

    def __init__(self, cache: PrefixCache, segment: _Segment) -> None:
        self._cache = cache
        self._segment = segment

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Writes a row's keys and values of one layer, (1, kv_heads, tokens, head_dim) each."""
        tokens = self._segment.tensor.shape[3]
        self._segment.tensor[layer, 0] = keys[0, :, :tokens]
        self._segment.tensor[layer, 1] = values[0, :, :tokens]

    def commit(self) -> None:
        """Caches the segment if all of it is finite: NaN may come from a token behind the prefix."""
        if self._segment.tensor.isfinite().all():
            self._cache.insert(self._segment)
