"""File objects as in OpenAI's API."""

from __future__ import annotations

from typing import Literal, Self

from api.schemas.common import Identified, seconds
from store.db.tables import File


class FileObject(Identified):
    """A file. Its status is always `processed`: rows are checked when a job uses them."""

    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: str | None = None

    @classmethod
    def of(cls, file: File) -> Self:
        return cls(
            id=file.id,
            bytes=file.bytes,
            created_at=seconds(file.created_at),
            filename=file.filename,
            purpose=file.purpose,
        )
