"""Prefills of a stage's rows (heft_engine.suffix_cache), used again by later runs on this machine: of arms that differ
in stage 2 alone, the first one computes them.

    prefill.json       the first layer kept, how many layers' states there are, and the seconds that it took
    states.bin         (depths, tokens, hidden): of all rows' suffixes, before the first layer kept and those above it
    keys_values.bin    row by row (layers, 2, kv_heads, skipped, head_dim)

A prefill is addressed by all that went into it, so what is found has the bits of what would be computed; only which
layers are wanted may differ, and a prefill that begins further down holds all that stands above. It does NOT know what
keys are made of (heft_engine.reuse), nor models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heft_engine.stage_store import LocalStages

#: What a machine keeps at most.
MAX_BYTES = 4 * 1024**3
_ABOUT, _STATES, _KEYS_VALUES = "prefill.json", "states.bin", "keys_values.bin"
#: Of what a machine keeps.
_LARGEST_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Prefill:
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
class PrefillFolder:
    """A machine's, under a budget of bytes. `owner`: nobody else finds what is kept for them."""

    directory: Path
    max_bytes: int = MAX_BYTES
    owner: str = ""

    def of(self, ingredients: Any) -> Prefills:
        """`ingredients`: a JSON value of everything that a prefill depends on but its first layer."""
        key = hashlib.sha256(json.dumps([self.owner, ingredients], sort_keys=True).encode()).hexdigest()
        return Prefills(folder=LocalStages(directory=self.directory, max_bytes=self.max_bytes), key=key)


@dataclass(frozen=True, kw_only=True)
class Prefills:
    """Where one stage's prefills are kept: `key` stands for the model, the rows and where their suffixes begin."""

    folder: LocalStages
    key: str

    def find(self, layer: int, tokens: int, hidden: int, dtype: torch.dtype) -> Prefill | None:
        """One that reaches down to `layer`: the nearest. Its tensors are mapped from files, never written to."""
        for first in range(layer, -1, -1):
            for path in self.folder.find([self._name(first)]):
                found = _read(path, tokens, hidden, dtype)
                if found is not None and found.has(layer):
                    return found
        return None

    def holds(self, size: int) -> bool:
        """Whether a prefill of so many bytes may be kept: larger ones would drive out all others."""
        return size <= _LARGEST_SHARE * self.folder.max_bytes

    def keep(self, first: int, states: Sequence[Tensor], keys_values: Tensor, seconds: float) -> None:
        """Keeps a prefill. states: (tokens, hidden) before layer `first` and those above it. Raises OSError."""

        def write(path: Path) -> None:
            about = {"first": first, "depths": len(states), "seconds": seconds}
            (path / _ABOUT).write_text(json.dumps(about))
            _write(path / _STATES, states)
            _write(path / _KEYS_VALUES, [keys_values])

        self.folder.keep(self._name(first), write)

    def _name(self, first: int) -> str:
        return f"{self.key}-{first}"


def _read(path: Path, tokens: int, hidden: int, dtype: torch.dtype) -> Prefill | None:
    """None for what another process has removed or replaced meanwhile."""
    try:
        about = json.loads((path / _ABOUT).read_text())
        states, keys_values = (_mapped(path / name, dtype) for name in (_STATES, _KEYS_VALUES))
        return Prefill(
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
