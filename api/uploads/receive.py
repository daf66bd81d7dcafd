"""One upload's way from the socket to storage: counted and hashed, never whole in memory or in a file here.

It does NOT know routes, keys or rows of the database.
"""

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
    """A file that is durable under its key. `size` in bytes, `sha256` in hex."""

    filename: str
    purpose: str
    size: int
    sha256: str


async def receive(request: Request, artifacts: Artifacts, *, key: str, limit: int) -> Received:
    """Stream the form's file to `key`. Whatever goes wrong, nothing is left there.

    Raises InvalidRequest for a form that is none, has other fields, or brings an empty file; TooLarge beyond
    `limit` bytes; Unavailable when the storage can't take it.
    """
    form = StreamedForm(request)
    upload = await to_thread.run_sync(artifacts.upload, key)
    try:
        async for chunk in form.chunks():
            if upload.size + len(chunk) > limit:
                raise TooLarge(f"a file has at most {limit:,} bytes", param="file")
            await to_thread.run_sync(upload.write, chunk)
        filename, purpose = _checked(form, upload.size)
        sha256 = await to_thread.run_sync(upload.commit)
    except BaseException as fault:
        with CancelScope(shield=True):
            await to_thread.run_sync(upload.abort)
        if isinstance(fault, OSError):
            raise Unavailable(f"the artifact storage does not take the file: {fault.strerror}") from fault
        raise
    return Received(filename=filename, purpose=purpose, size=upload.size, sha256=sha256)


def _checked(form: StreamedForm, size: int) -> tuple[str, str]:
    """The file's name and purpose, once the whole form is here."""
    unknown = sorted(form.fields.keys() - _FORM_FIELDS)
    if unknown:
        raise InvalidRequest("there is no such field", param=unknown[0], code="unknown_parameter")
    purpose = form.fields.get("purpose")
    if purpose is None:
        raise InvalidRequest("say purpose=fine-tune", param="purpose", code="missing_required_parameter")
    if purpose != TRAINING_PURPOSE:
        raise InvalidRequest(f"files are taken for the purpose {TRAINING_PURPOSE!r}", param="purpose")
    if size == 0:
        raise InvalidRequest("the file is empty", param="file", code="empty_file")
    assert form.filename is not None
    return form.filename, purpose
