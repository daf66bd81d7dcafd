"""A multipart form parsed as a stream: small fields into a dict, the file as chunks that are never collected.

Starlette's form parser would write every upload to a temporary file before the route runs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from email.message import Message

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from store.errors import InvalidRequest, TooLarge

MAX_FIELDS = 16
MAX_FIELD_BYTES = 4_096


@dataclass(kw_only=True)
class _Part:
    name: str = ""
    filename: str | None = None
    data: bytearray = field(default_factory=bytearray)


class StreamedForm:
    """The form of a request: `chunks` yields its file; fields and file name are complete when it has ended.

    Raises InvalidRequest for a malformed form, TooLarge for a large field.
    """

    def __init__(self, request: Request) -> None:
        content_type, options = parse_options_header(request.headers.get("content-type"))
        if content_type != b"multipart/form-data" or b"boundary" not in options:
            raise InvalidRequest("the body must be multipart/form-data with a boundary", code="invalid_form")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._body = request.stream()
        self._part = _Part()
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self._chunks: list[bytes] = []
        self._complete = False
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as fault:
            raise InvalidRequest(f"the form can't be parsed: {fault}", code="invalid_form") from fault

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yields the file's bytes as they arrive."""
        async for data in self._body:
            try:
                self._parser.write(data)
            except FormParserError as fault:
                raise InvalidRequest(f"the form can't be parsed: {fault}", code="invalid_form") from fault
            chunks, self._chunks = self._chunks, []
            for chunk in chunks:
                yield chunk
        if not self._complete:
            raise InvalidRequest("the form's last boundary is missing", code="invalid_form")
        if self.filename is None:
            raise InvalidRequest("the form has no file", param="file", code="missing_required_parameter")

    def _on_part_begin(self) -> None:
        self._part = _Part()
        self._disposition = b""

    def _on_header_end(self) -> None:
        name, value = self._header
        if bytes(name).lower() == b"content-disposition":
            self._disposition = bytes(value)
        self._header = (bytearray(), bytearray())

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        part = self._part
        part.name = _text(options.get(b"name", b""), param="file")
        if part.name == "file":
            if self.filename is not None:
                raise InvalidRequest("the form must have only one file", param="file")
            filename = _filename(self._disposition, options.get(b"filename"))
            if filename is None:
                raise InvalidRequest("the file must have a file name", param="file")
            part.filename = self.filename = filename
        elif not part.name:
            raise InvalidRequest("a part of the form has no name", code="invalid_form")
        elif part.name in self.fields:
            raise InvalidRequest("the field is repeated", param=part.name)
        elif len(self.fields) == MAX_FIELDS:
            raise TooLarge(f"the form has more than {MAX_FIELDS} fields")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        if part.filename is not None:
            self._chunks.append(data[start:end])
            return
        part.data += data[start:end]
        if len(part.data) > MAX_FIELD_BYTES:
            raise TooLarge(f"the field is larger than {MAX_FIELD_BYTES:,} bytes", param=part.name)

    def _on_part_end(self) -> None:
        if self._part.filename is None:
            self.fields[self._part.name] = _text(bytes(self._part.data), param=self._part.name)

    def _on_end(self) -> None:
        self._complete = True


def _filename(disposition: bytes, plain: bytes | None) -> str | None:
    """Returns the file name of a part. Clients on urllib3 1 send `filename*=utf-8''…` alone, others Latin-1."""
    if plain is None:
        message = Message()
        message["content-disposition"] = disposition.decode("latin-1")
        filename = message.get_filename()
        return None if filename is None else _text(filename.encode(), param="file")
    try:
        return _text(plain, param="file")
    except InvalidRequest:
        return _text(plain.decode("latin-1").encode(), param="file")


def _text(data: bytes, *, param: str) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as fault:
        raise InvalidRequest("names and fields of the form must be UTF-8", param=param) from fault
    if "\0" in text:
        raise InvalidRequest("names and fields of the form must not contain NUL", param=param)
    return text
