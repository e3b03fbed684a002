"""Reads forms with one file (`multipart/form-data`, RFC 7578). The file is processed while it is still arriving."""

import logging
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from serving.http.body import MediaTypeError
from serving.protocols.request import InvalidRequestError

FORM_BYTES = 2**20
"""Maximum size of a form without its file, in bytes."""
MAX_NAME = 255
_MEDIA_TYPE = b"multipart/form-data"
_MAX_FIELD_BYTES = 1024
_NOT_IN_NAMES = {"Cc", "Cs", "Zl", "Zp"}  # control characters, lone surrogates, line and paragraph separators
logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns about each malformed form


@dataclass(frozen=True, slots=True)
class Form:
    """A form that has been read.

    Attributes:
        fields: text of each field except the file, keyed by field name.
        filename: the client's name for the file, or None if the client sent no name.
    """

    fields: Mapping[str, str]
    filename: str | None


def boundary_of(content_type: bytes) -> bytes:
    """Return the boundary of a form from its Content-Type.

    Raises:
        MediaTypeError: the content type is not `multipart/form-data`.
        InvalidRequestError: the content type has no boundary.
    """
    media_type, options = parse_options_header(content_type.decode("latin-1"))
    if media_type.strip() != _MEDIA_TYPE:
        raise MediaTypeError("the content type is not multipart/form-data", expected=_MEDIA_TYPE.decode())
    if not options.get(b"boundary"):
        raise InvalidRequestError("the content type has no boundary", param="content-type")
    return options[b"boundary"]


def read_form(
    boundary: bytes, body: Iterable[bytes], *, file: str, fields: Collection[str], write: Callable[[bytes], object]
) -> Form:
    """Read a form.

    Args:
        file: name of the required part that contains the file.
        fields: names of the other parts that are allowed.
        write: called with each piece of the file, in order.

    Raises:
        InvalidRequestError: the form is malformed or incomplete, or contains other parts.
    """
    reader = _Reader(file, fields, write)
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": reader.begin_part,
                "on_header_field": reader.add_header_name,
                "on_header_value": reader.add_header_value,
                "on_header_end": reader.end_header,
                "on_headers_finished": reader.end_headers,
                "on_part_data": reader.add_data,
                "on_end": reader.end,
            },
        )
        for part in body:
            parser.write(part)
    except FormParserError as error:
        raise InvalidRequestError(f"the form is malformed: {error}", param=file) from error
    return reader.form()


def clean_name(text: str, param: str) -> str:
    """Return a file's name without the folders that some clients include in it.

    Args:
        param: name of the request's field, for the error.

    Raises:
        InvalidRequestError: the remaining name is not usable.
    """
    name = text.replace("\\", "/").rpartition("/")[2].strip()
    usable = name not in ("", ".", "..") and len(name) <= MAX_NAME
    if not usable or any(unicodedata.category(character) in _NOT_IN_NAMES for character in name):
        raise InvalidRequestError(
            f"the file name {text[:100]!a} cannot be used",
            param=param,
            expected=f"1 to {MAX_NAME} characters, without control characters",
        )
    return name


class _Reader:
    """Receives the multipart parser's callbacks and collects the form's fields."""

    def __init__(self, file: str, fields: Collection[str], write: Callable[[bytes], object]) -> None:
        self._file = file
        self._allowed = frozenset(fields)
        self._write = write
        self._fields: dict[str, bytearray] = {}
        self._filename: str | None = None
        self._has_file = self._complete = False
        self._part: bytearray | None = None  # None while the file is read
        self._header_name, self._header_value = bytearray(), bytearray()
        self._disposition = b""

    def form(self) -> Form:
        if not self._complete:
            wrong = "the form is incomplete: the request body ends before its last boundary"
            raise InvalidRequestError(wrong, param=self._file)
        if not self._has_file:
            raise InvalidRequestError(f"the form has no field {self._file!r}", param=self._file, expected="a file")
        return Form({name: _decode(value, name) for name, value in self._fields.items()}, self._filename)

    def begin_part(self) -> None:
        self._disposition = b""

    def add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def end_headers(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        name = _decode(options.get(b"name", b""), "name")
        if (name == self._file and self._has_file) or name in self._fields:
            raise InvalidRequestError(f"the form contains the field {name!r} twice", param=name)
        if name == self._file:
            self._has_file, self._part = True, None
            if b"filename" in options:
                self._filename = _decode(options[b"filename"], name)
        elif name in self._allowed:
            self._part = self._fields[name] = bytearray()
        else:
            expected = ", ".join(sorted({self._file, *self._allowed}))
            raise InvalidRequestError(f"unknown field {name[:100]!a}", param=name[:100], expected=expected)

    def add_data(self, data: bytes, start: int, end: int) -> None:
        if self._part is None:
            self._write(data[start:end])
            return
        self._part += data[start:end]
        if len(self._part) > _MAX_FIELD_BYTES:
            name = next(name for name, value in self._fields.items() if value is self._part)
            raise InvalidRequestError(f"{name!r} is too long", param=name, expected=f"at most {_MAX_FIELD_BYTES} bytes")

    def end(self) -> None:
        self._complete = True


def _decode(value: bytes | bytearray, param: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"the form has invalid UTF-8 in {param!r}", param=param) from error
