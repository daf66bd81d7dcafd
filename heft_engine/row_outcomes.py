"""Right and wrong, row by row, as short text: eight rows a byte, in base64. It does NOT know what was right."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.bool_]


def pack_rows(right: Sequence[bool]) -> str:
    """3,270 rows are 548 letters."""
    return base64.b64encode(np.packbits(np.asarray(right, dtype=bool)).tobytes()).decode()


def unpack_rows(text: str, rows: int) -> Rows:
    """What `pack_rows` made of so many rows. Raises ValueError for a text of another length."""
    packed = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    if len(packed) != -(-rows // 8):
        raise ValueError(f"{len(packed)} bytes don't hold {rows} rows")
    return np.unpackbits(packed, count=rows).astype(bool)
