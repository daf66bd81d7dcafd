"""A response that streams a stored artifact from a thread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from anyio import to_thread
from fastapi.responses import StreamingResponse

from store.storage.artifacts import Artifacts

_CHUNK_BYTES = 256 * 1024


async def stored_response(
    artifacts: Artifacts, key: str, *, media_type: str, size: int | None, filename: str | None = None
) -> StreamingResponse:
    """Opens the artifact before the headers are sent. Raises Damaged if it does not exist."""
    file = await to_thread.run_sync(artifacts.open, key)
    headers = {}
    if size is not None:
        headers["Content-Length"] = str(size)
    if filename is not None:
        headers["Content-Disposition"] = f'attachment; filename="{filename}"'
    return StreamingResponse(_chunks(file), media_type=media_type, headers=headers)


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk
