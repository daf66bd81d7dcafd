"""What came of each row, as short text in base64: right and wrong, eight rows a byte; or how right, two bytes a row.

It does NOT know what was right.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.bool_]
Values = NDArray[np.float64]
_MOST = 65_535


def pack_rows(right: Sequence[bool]) -> str:
    """3,270 rows are 548 letters."""
    return base64.b64encode(np.packbits(np.asarray(right, dtype=bool)).tobytes()).decode()


def unpack_rows(text: str, rows: int) -> Rows:
    """What `pack_rows` made of so many rows. Raises ValueError for a text of another length."""
    packed = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    if len(packed) != -(-rows // 8):
        raise ValueError(f"{len(packed)} bytes don't hold {rows} rows")
    return np.unpackbits(packed, count=rows).astype(bool)


def pack_values(values: Sequence[float]) -> str:
    """Values from 0 to 1, to a hundred-thousandth; 3,270 rows are 8,720 letters."""
    return base64.b64encode(np.rint(np.asarray(values) * _MOST).astype("<u2").tobytes()).decode()


def unpack_values(text: str, rows: int) -> Values:
    """What `pack_values` made of so many rows. Raises ValueError for a text of another length."""
    packed = np.frombuffer(base64.b64decode(text, validate=True), dtype="<u2")
    if len(packed) != rows:
        raise ValueError(f"{len(packed)} values are not {rows} rows")
    return packed.astype(np.float64) / _MOST
