"""Files: upload, list, download, delete. Uploads and downloads are streamed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from sqlalchemy.orm import Session

from api.deps import After, Caller, Db, IdempotencyKey, ServicesDep, body_hash
from api.schemas.common import Deleted, Listing
from api.schemas.files import FileObject
from api.stored_response import stored_response
from api.uploads import receive
from store import idempotency
from store.db.tables import File
from store.errors import Conflict
from store.ids import new_file_id
from store.storage import files
from store.storage.artifacts import file_key
from store.storage.files import NewFile

router = APIRouter(prefix="/v1/files", tags=["Files"])

#: `api.uploads.receive` reads the body itself, so FastAPI can't describe it.
UPLOAD_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "JSONL, one row per line.",
                        },
                        "purpose": {"type": "string", "enum": [files.TRAINING_PURPOSE]},
                    },
                }
            }
        },
    }
}


@router.post("", openapi_extra=UPLOAD_FORM)
async def upload_file(
    request: Request, caller: Caller, db: Db, services: ServicesDep, idempotency_key: IdempotencyKey = None
) -> FileObject:
    """Uploads training, validation or test rows: JSONL in one of the four row formats, as a multipart form."""
    file_id = new_file_id()
    storage_key = file_key(file_id)
    received = await receive.receive(
        request, services.artifacts, key=storage_key, limit=services.settings.max_file_bytes
    )
    try:
        file = await db(
            _record,
            owner_id=caller.id,
            idempotency_key=idempotency_key,
            received=received,
            file_id=file_id,
        )
    except Conflict:
        await to_thread.run_sync(services.artifacts.delete, storage_key)
        raise
    if file.id != file_id:  # a repeated request: the first upload's bytes are kept
        await to_thread.run_sync(services.artifacts.delete, storage_key)
    return FileObject.of(file)


def _record(
    session: Session,
    *,
    owner_id: str,
    idempotency_key: str | None,
    received: receive.Received,
    file_id: str,
) -> File:
    if idempotency_key is not None:
        reserved = idempotency.reserve(
            session,
            owner_id=owner_id,
            key=idempotency_key,
            body_hash=body_hash([received.purpose, received.filename, received.sha256]),
            resource_id=file_id,
        )
        if not reserved.is_new:
            return files.get(session, owner_id=owner_id, file_id=reserved.resource_id)
    file = NewFile(
        file_id=file_id,
        filename=received.filename,
        size=received.size,
        sha256=received.sha256,
        storage_key=file_key(file_id),
    )
    return files.create(session, owner_id=owner_id, purpose=received.purpose, file=file)


@router.get("")
async def list_files(
    caller: Caller,
    db: Db,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> Listing[FileObject]:
    """Files, newest first unless `order=asc`."""
    page = await db(
        files.list_page, owner_id=caller.id, limit=limit, after=after, order=order, purpose=purpose
    )
    return Listing.of([FileObject.of(file) for file in page.items], has_more=page.has_more)


@router.get("/{file_id}")
async def retrieve_file(file_id: str, caller: Caller, db: Db) -> FileObject:
    """A file's metadata; its content is at `/content`."""
    return FileObject.of(await db(files.get, owner_id=caller.id, file_id=file_id))


@router.delete("/{file_id}")
async def delete_file(file_id: str, caller: Caller, db: Db) -> Deleted:
    """Deletes a file. Its content is kept until the last unfinished job that uses it has ended."""
    await db(files.delete, owner_id=caller.id, file_id=file_id)
    return Deleted(id=file_id, object="file")


@router.get("/{file_id}/content", response_class=StreamingResponse)
async def file_content(file_id: str, caller: Caller, db: Db, services: ServicesDep) -> StreamingResponse:
    """A file's content, as uploaded."""
    file = await db(files.get, owner_id=caller.id, file_id=file_id)
    return await stored_response(
        services.artifacts, file.storage_key, media_type="application/octet-stream", size=file.bytes
    )
