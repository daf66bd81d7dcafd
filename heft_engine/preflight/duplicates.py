"""Duplicate rows within a file and between files, found by hashes that take 12 bytes a row."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from heft_engine.data.rows import Row


@dataclass(kw_only=True)
class RowHashes:
    """The rows of a file: for each the hash of everything but its answer, and its line."""

    hashes: array[int] = field(default_factory=lambda: array("Q"))
    lines: array[int] = field(default_factory=lambda: array("I"))

    def add(self, row: Row, line: int) -> None:
        digest = blake2b(repr(replace(row, answer=None)).encode(), digest_size=8).digest()
        self.hashes.append(int.from_bytes(digest))
        self.lines.append(line)

    def repeated(self) -> list[int]:
        """Returns the lines of rows that are on an earlier line too."""
        _, first = np.unique(self._hashes(), return_index=True)
        is_repeated = np.ones(len(self.hashes), dtype=bool)
        is_repeated[first] = False
        return self._lines(is_repeated)

    def also_in(self, other: RowHashes) -> list[int]:
        """Returns the lines of rows that are in the other file too."""
        return self._lines(np.isin(self._hashes(), other._hashes()))

    def _hashes(self) -> npt.NDArray[np.uint64]:
        return np.frombuffer(self.hashes, dtype=np.uint64) if self.hashes else np.empty(0, dtype=np.uint64)

    def _lines(self, mask: npt.NDArray[np.bool_]) -> list[int]:
        return [self.lines[index] for index in np.flatnonzero(mask)]
