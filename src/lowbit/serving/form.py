"""Multipart bodies, in memory: the gate bounds their size. A body that breaks off is an error, not a shorter form."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from lowbit.serving.errors import invalid

_MAX_PARTS = 96


@dataclass(frozen=True)
class Part:
    """A field or a file.

    Attributes:
        name: of the field.
        content: its bytes.
        is_file: it has a file name.
    """

    name: str
    content: bytes
    is_file: bool


class _Collector:
    """Takes the parser's callbacks."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.is_complete = False
        self._headers: dict[bytes, bytes] = {}
        self._field = self._value = b""
        self._content = bytearray()

    def on_part_begin(self) -> None:
        self._headers, self._content = {}, bytearray()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        self._headers[self._field.lower()] = self._value
        self._field = self._value = b""

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._content += data[start:end]

    def on_part_end(self) -> None:
        if len(self.parts) >= _MAX_PARTS:
            raise invalid(f"The body has more than {_MAX_PARTS} fields and files")
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if b"name" not in options:
            raise invalid("The body is not valid multipart/form-data: a part has no name")
        name = _text(options[b"name"], "a name")
        self.parts.append(Part(name, bytes(self._content), b"filename" in options))

    def on_end(self) -> None:
        self.is_complete = True


def parse_form(content: bytes, content_type: str) -> list[Part]:
    """Return the parts of a multipart body.

    Args:
        content: the body.
        content_type: the header, which holds the boundary.

    Raises:
        ApiError: another kind of body, a malformed one, or one that breaks off.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise invalid("Content-Type: expected multipart/form-data with a boundary")
    collector = _Collector()
    names = [name for name in dir(collector) if name.startswith("on_")]
    callbacks: Any = {name: getattr(collector, name) for name in names}
    try:
        MultipartParser(options[b"boundary"], callbacks).write(content)
    except FormParserError as error:
        raise invalid(f"The body is not valid multipart/form-data: {error}") from error
    if not collector.is_complete:
        raise invalid("The body is not valid multipart/form-data: it breaks off before the last boundary")
    return collector.parts


async def read_form(request: Request, files: Collection[str]) -> tuple[dict[str, str], list[Part]]:
    """Return a multipart body's fields and its files.

    Args:
        request: with the body.
        files: names that are files.

    Raises:
        ApiError: as ``parse_form``; a file where a field is expected or the reverse; a field that is given twice.
    """
    parts = parse_form(await request.body(), request.headers.get("content-type", ""))
    for part in parts:
        if part.is_file != (part.name in files):
            raise invalid(f"{part.name}: expected {'a file' if part.name in files else 'a field, no file'}", part.name)
    fields = [part for part in parts if not part.is_file]
    _check_once(fields)
    return {part.name: _text(part.content, part.name) for part in fields}, [part for part in parts if part.is_file]


def _check_once(fields: Sequence[Part]) -> None:
    seen: set[str] = set()
    for part in fields:
        if part.name in seen:
            raise invalid(f"{part.name!r} is given twice", part.name)
        seen.add(part.name)


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(f"{name}: is not UTF-8", name) from error
