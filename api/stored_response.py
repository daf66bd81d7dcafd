"""Stored bytes as an answer: opened before the first header goes out, then sent in pieces from a thread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from anyio import to_thread
from fastapi.responses import StreamingResponse

from store.storage.artifacts import Artifacts

_PIECE = 256 * 1024


async def stored(
    artifacts: Artifacts, key: str, *, media_type: str, size: int | None, filename: str | None = None
) -> StreamingResponse:
    """Raises Damaged when nothing is stored under `key`: an answer that has begun could no longer say so."""
    file = await to_thread.run_sync(artifacts.open, key)
    headers = {}
    if size is not None:
        headers["Content-Length"] = str(size)
    if filename is not None:
        headers["Content-Disposition"] = f'attachment; filename="{filename}"'
    return StreamingResponse(_pieces(file), media_type=media_type, headers=headers)


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while piece := file.read(_PIECE):
            yield piece
