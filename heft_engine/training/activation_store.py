"""Prefills of a stage's rows (heft_engine.training.activation_cache), used again by later runs on this machine: of
arms that differ
in stage 2 alone, the first one computes them.

    prefill.json       the first layer kept, how many layers' states there are, and the seconds that it took
    states.bin         (depths, tokens, hidden): of all rows' suffixes, before the first layer kept and those above it
    keys_values.bin    row by row (layers, 2, kv_heads, skipped, head_dim)

A prefill is addressed by all that went into it, so what is found has the bits of what would be computed; only which
layers are wanted may differ, and a prefill that begins further down holds all that stands above. It does NOT know what
keys are made of (heft_engine.training.stage_cache), nor models.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from heft_engine.training.stage_store import LocalStages

#: What a machine keeps at most.
MAX_BYTES = 4 * 1024**3
_ABOUT, _STATES, _KEYS_VALUES = "prefill.json", "states.bin", "keys_values.bin"
#: Of what a machine keeps.
_LARGEST_SHARE = 0.5
#: A prefill is written, read back and hashed each time: one that was computed faster is not worth it. Hashing alone
#: was measured at 1.3 GB/s; the rest is for disks.
_BYTES_A_SECOND = 200e6


@dataclass(frozen=True, kw_only=True)
class SavedActivations:
    """states: (depths, tokens, hidden), depth 0 standing before layer `first`. keys_values: flat, row by row.

    seconds: that computing it took.
    """

    first: int
    states: Tensor
    keys_values: Tensor
    seconds: float

    def has(self, layer: int) -> bool:
        """Whether a stage whose training begins at this layer finds all it needs."""
        return self.first <= layer < self.first + len(self.states)


@dataclass(frozen=True, kw_only=True)
class ActivationStore:
    """A machine's, under a budget of bytes. `owner`: nobody else finds what is kept for them."""

    directory: Path
    max_bytes: int = MAX_BYTES
    owner: str = ""

    def of(self, key: str) -> StageActivations:
        """`key`: stands for everything that a prefill depends on but its first layer, and its owner."""
        return StageActivations(
            folder=LocalStages(directory=self.directory, max_bytes=self.max_bytes), key=key
        )


@dataclass(frozen=True, kw_only=True)
class StageActivations:
    """Where one stage's prefills are kept: `key` stands for the model, the rows and where their suffixes begin."""

    folder: LocalStages
    key: str

    def find(self, layer: int, tokens: int, hidden: int, dtype: torch.dtype) -> SavedActivations | None:
        """One that reaches from `layer` down to it: the nearest. Its tensors are mapped from files."""
        for first in range(layer, -1, -1):
            # Only one that would do is read through, to see that it is whole.
            if first + self._depths(first) > layer:
                for path in self.folder.find([self._name(first)]):
                    found = _read(path, tokens, hidden, dtype)
                    if found is not None and found.has(layer):
                        return found
        return None

    def holds(self, size: int) -> bool:
        """Whether a prefill of so many bytes may be kept: larger ones would drive out all others."""
        return size <= _LARGEST_SHARE * self.folder.max_bytes

    def keep(self, first: int, states: Sequence[Tensor], keys_values: Tensor, seconds: float) -> None:
        """Keeps a prefill that took so long, if finding it again is quicker and none as good is there.

        states: (tokens, hidden) before layer `first` and those above it. Raises OSError.
        """
        size = sum(part.nbytes for part in (*states, keys_values))
        if seconds < size / _BYTES_A_SECOND or self._depths(first) >= len(states):
            return

        def write(path: Path) -> None:
            about = {"first": first, "depths": len(states), "seconds": seconds}
            (path / _ABOUT).write_text(json.dumps(about))
            _write(path / _STATES, states)
            _write(path / _KEYS_VALUES, [keys_values])

        self.folder.put(self._name(first), write)

    def _depths(self, first: int) -> int:
        """Of the prefill from this layer on; 0 where there is none."""
        try:
            return int(json.loads((self.folder.directory / self._name(first) / _ABOUT).read_text())["depths"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def _name(self, first: int) -> str:
        return f"{self.key}-{first}"


def _read(path: Path, tokens: int, hidden: int, dtype: torch.dtype) -> SavedActivations | None:
    """None for what another process has removed or replaced meanwhile."""
    try:
        about = json.loads((path / _ABOUT).read_text())
        states, keys_values = (_mapped(path / name, dtype) for name in (_STATES, _KEYS_VALUES))
        return SavedActivations(
            first=about["first"],
            states=states.view(about["depths"], tokens, hidden),
            keys_values=keys_values,
            seconds=about["seconds"],
        )
    except (OSError, RuntimeError):
        return None


def _write(path: Path, tensors: Sequence[Tensor]) -> None:
    with path.open("wb") as file:
        for tensor in tensors:
            tensor.contiguous().view(-1).view(torch.uint8).numpy().tofile(file)


def _mapped(path: Path, dtype: torch.dtype) -> Tensor:
    """A private mapping: it outlives the file, and nothing that is written to it reaches the file."""
    size = path.stat().st_size // dtype.itemsize
    if not size:
        return torch.empty(0, dtype=dtype)
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype)
