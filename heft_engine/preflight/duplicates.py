"""Which rows of a file repeat each other or stand in another file too, at 12 bytes a row.

It does NOT know files: rows come in with their lines.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from heft_engine.data.rows import Row


@dataclass(kw_only=True)
class RowHashes:
    """The rows of one file: a hash of each without its answer, and its line."""

    hashes: array[int] = field(default_factory=lambda: array("Q"))
    lines: array[int] = field(default_factory=lambda: array("I"))

    def add(self, row: Row, line: int) -> None:
        digest = blake2b(repr(replace(row, answer=None)).encode(), digest_size=8).digest()
        self.hashes.append(int.from_bytes(digest))
        self.lines.append(line)

    def repeated(self) -> list[int]:
        """Lines whose row stands on an earlier line already."""
        _, first = np.unique(self._hashes(), return_index=True)
        again = np.ones(len(self.hashes), dtype=bool)
        again[first] = False
        return self._lines(again)

    def also_in(self, other: RowHashes) -> list[int]:
        """Lines whose row is in the other file too."""
        return self._lines(np.isin(self._hashes(), other._hashes()))

    def _hashes(self) -> npt.NDArray[np.uint64]:
        return np.frombuffer(self.hashes, dtype=np.uint64) if self.hashes else np.empty(0, dtype=np.uint64)

    def _lines(self, chosen: npt.NDArray[np.bool_]) -> list[int]:
        return [self.lines[index] for index in np.flatnonzero(chosen)]
