"""Activations of frozen layers on disk, for later runs on this machine: of arms that differ in stage 2 alone, the first
one computes them (heft_engine.training.activation_cache).

    prefill.json       the first stored layer, the number of layers with states, and the seconds of computing them
    states.bin         (depths, tokens, hidden): the suffixes' states before the first stored layer and those above it
    keys_values.bin    row by row (layers, 2, kv_heads, prefix_length, head_dim)

An entry's key covers all that it was computed from (heft_engine.training.stage_cache), so it has the bits of a new
computation. Only the layer may differ: an entry that begins at a lower layer serves the layers above it too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from heft_engine.training.stage_store import LocalStages

#: Bytes of one machine's store.
MAX_BYTES = 4 * 1024**3
_METADATA, _STATES, _KEYS_VALUES = "prefill.json", "states.bin", "keys_values.bin"
#: An entry takes at most this share of the store.
_LARGEST_SHARE = 0.5
#: An entry is written, read back and hashed each time: what was computed faster than this is not stored. Hashing alone
#: was measured at 1.3 GB/s; the rest allows for disks.
_BYTES_PER_SECOND = 200e6


@dataclass(frozen=True, kw_only=True)
class SavedActivations:
    """An entry: states (depths, tokens, hidden), depth 0 before layer `first`; keys_values flat, row by row.

    seconds: of computing it.
    """

    first: int
    states: Tensor
    keys_values: Tensor
    seconds: float

    def covers(self, layer: int) -> bool:
        """Returns whether it serves a stage whose training begins at this layer."""
        return self.first <= layer < self.first + len(self.states)


@dataclass(frozen=True, kw_only=True)
class ActivationStore:
    """A machine's store, under a budget of bytes. Entries are found by their `owner` alone."""

    directory: Path
    max_bytes: int = MAX_BYTES
    owner: str = ""

    def for_key(self, key: str) -> StageActivations:
        """Returns the entries of a key, which covers all they depend on but the first layer, and their owner."""
        return StageActivations(
            folder=LocalStages(directory=self.directory, max_bytes=self.max_bytes), key=key
        )


@dataclass(frozen=True, kw_only=True)
class StageActivations:
    """The entries of one key: of one model, its rows and the start of their suffixes."""

    folder: LocalStages
    key: str

    def find(self, layer: int, tokens: int, hidden: int, dtype: torch.dtype) -> SavedActivations | None:
        """Returns the entry that covers `layer` and begins nearest to it, mapped from files; or None."""
        for first in range(layer, -1, -1):
            # Only an entry that would do is read through, to verify it.
            if first + self._depths(first) > layer:
                for path in self.folder.find([self._name(first)]):
                    saved = _read(path, tokens, hidden, dtype)
                    if saved is not None and saved.covers(layer):
                        return saved
        return None

    def accepts(self, size: int) -> bool:
        """Returns whether an entry may have so many bytes: larger ones would evict all others."""
        return size <= _LARGEST_SHARE * self.folder.max_bytes

    def put(self, first: int, states: Sequence[Tensor], keys_values: Tensor, seconds: float) -> None:
        """Stores an entry, unless computing it again is faster than reading it, or one with as many layers exists.

        states: (tokens, hidden) before layer `first` and those above it. seconds: of computing it. Raises OSError.
        """
        size = sum(tensor.nbytes for tensor in (*states, keys_values))
        if seconds < size / _BYTES_PER_SECOND or self._depths(first) >= len(states):
            return

        def write(path: Path) -> None:
            metadata = {"first": first, "depths": len(states), "seconds": seconds}
            (path / _METADATA).write_text(json.dumps(metadata))
            _write(path / _STATES, states)
            _write(path / _KEYS_VALUES, [keys_values])

        self.folder.put(self._name(first), write)

    def _depths(self, first: int) -> int:
        """Returns the depths of the entry that begins at this layer; 0 if there is none."""
        try:
            metadata = (self.folder.directory / self._name(first) / _METADATA).read_text()
            return int(json.loads(metadata)["depths"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def _name(self, first: int) -> str:
        return f"{self.key}-{first}"


def _read(path: Path, tokens: int, hidden: int, dtype: torch.dtype) -> SavedActivations | None:
    """Returns None for an entry that another process has removed or replaced meanwhile."""
    try:
        metadata = json.loads((path / _METADATA).read_text())
        states, keys_values = (_mapped(path / name, dtype) for name in (_STATES, _KEYS_VALUES))
        return SavedActivations(
            first=metadata["first"],
            states=states.view(metadata["depths"], tokens, hidden),
            keys_values=keys_values,
            seconds=metadata["seconds"],
        )
    except (OSError, RuntimeError):
        return None


def _write(path: Path, tensors: Sequence[Tensor]) -> None:
    with path.open("wb") as file:
        for tensor in tensors:
            tensor.contiguous().view(-1).view(torch.uint8).numpy().tofile(file)


def _mapped(path: Path, dtype: torch.dtype) -> Tensor:
    """Returns a private mapping of a file: it outlives the file, and writes to it do not reach the file."""
    size = path.stat().st_size // dtype.itemsize
    if not size:
        return torch.empty(0, dtype=dtype)
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype)
