"""Streams an upload from the socket to storage, counting and hashing it."""

from __future__ import annotations

from dataclasses import dataclass

from anyio import CancelScope, to_thread
from starlette.requests import Request

from api.uploads.multipart import StreamedForm
from store.errors import InvalidRequest, TooLarge, Unavailable
from store.storage.artifacts import Artifacts
from store.storage.files import TRAINING_PURPOSE

_FORM_FIELDS = frozenset({"purpose"})


@dataclass(frozen=True, kw_only=True)
class Received:
    """A stored file. `size` in bytes, `sha256` in hex."""

    filename: str
    purpose: str
    size: int
    sha256: str


async def receive(request: Request, artifacts: Artifacts, *, key: str, limit: int) -> Received:
    """Streams the form's file to the storage key; leaves nothing there on errors.

    Raises InvalidRequest for a malformed form, unknown fields or an empty file; TooLarge above `limit` bytes;
    Unavailable if the storage fails.
    """
    form = StreamedForm(request)
    upload = await to_thread.run_sync(artifacts.upload, key)
    try:
        async for chunk in form.chunks():
            if upload.size + len(chunk) > limit:
                raise TooLarge(f"the file is larger than {limit:,} bytes", param="file")
            await to_thread.run_sync(upload.write, chunk)
        filename, purpose = _checked(form, upload.size)
        sha256 = await to_thread.run_sync(upload.commit)
    except BaseException as fault:
        with CancelScope(shield=True):
            await to_thread.run_sync(upload.abort)
        if isinstance(fault, OSError):
            raise Unavailable(f"the artifact storage can't store the file: {fault.strerror}") from fault
        raise
    return Received(filename=filename, purpose=purpose, size=upload.size, sha256=sha256)


def _checked(form: StreamedForm, size: int) -> tuple[str, str]:
    """Returns the file's name and purpose from the complete form."""
    unknown = sorted(form.fields.keys() - _FORM_FIELDS)
    if unknown:
        raise InvalidRequest("unknown field", param=unknown[0], code="unknown_parameter")
    purpose = form.fields.get("purpose")
    if purpose is None:
        raise InvalidRequest("purpose is required", param="purpose", code="missing_required_parameter")
    if purpose != TRAINING_PURPOSE:
        raise InvalidRequest(f"purpose must be {TRAINING_PURPOSE!r}", param="purpose")
    if size == 0:
        raise InvalidRequest("the file is empty", param="file", code="empty_file")
    assert form.filename is not None
    return form.filename, purpose
