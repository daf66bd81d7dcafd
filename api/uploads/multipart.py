"""A multipart form read piece by piece: small fields into a dict, the one file as a stream, never held.

Starlette's own form parsing puts every upload into a temporary file first, before any route has a say.
It does NOT know where the file's bytes go.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

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
    """The form of one request: `chunks` yields the bytes of its `file`; the rest is known when it has ended.

    Raises InvalidRequest where the body is no such form, TooLarge where a field is no small one.
    """

    def __init__(self, request: Request) -> None:
        content_type, options = parse_options_header(request.headers.get("content-type"))
        if content_type != b"multipart/form-data" or b"boundary" not in options:
            raise InvalidRequest("send the file as multipart/form-data, with a boundary", code="invalid_form")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._body = request.stream()
        self._part = _Part()
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self._arrived: list[bytes] = []
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
            raise InvalidRequest(f"the form can't be read: {fault}", code="invalid_form") from fault

    async def chunks(self) -> AsyncIterator[bytes]:
        """The file's bytes as they arrive. When it ends, `fields` and `filename` are complete."""
        async for data in self._body:
            try:
                self._parser.write(data)
            except FormParserError as fault:
                raise InvalidRequest(f"the form can't be read: {fault}", code="invalid_form") from fault
            arrived, self._arrived = self._arrived, []
            for chunk in arrived:
                yield chunk
        if not self._complete:
            raise InvalidRequest("the form ends before its last boundary", code="invalid_form")
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
                raise InvalidRequest("one file at a time", param="file")
            if b"filename" not in options:
                raise InvalidRequest("the file needs a file name", param="file")
            part.filename = self.filename = _text(options[b"filename"], param="file")
        elif not part.name:
            raise InvalidRequest("a part of the form has no name", code="invalid_form")
        elif part.name in self.fields:
            raise InvalidRequest("this field is there twice", param=part.name)
        elif len(self.fields) == MAX_FIELDS:
            raise TooLarge(f"a form has at most {MAX_FIELDS} fields")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        if part.filename is not None:
            self._arrived.append(data[start:end])
            return
        part.data += data[start:end]
        if len(part.data) > MAX_FIELD_BYTES:
            raise TooLarge(f"a field has at most {MAX_FIELD_BYTES:,} bytes", param=part.name)

    def _on_part_end(self) -> None:
        if self._part.filename is None:
            self.fields[self._part.name] = _text(bytes(self._part.data), param=self._part.name)

    def _on_end(self) -> None:
        self._complete = True


def _text(data: bytes, *, param: str) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as fault:
        raise InvalidRequest("names and fields of a form are UTF-8", param=param) from fault
    if "\0" in text:
        raise InvalidRequest("text can't hold a NUL", param=param)
    return text
