"""Records of CSV files: the header names the keys, every cell is text.

Cells of the columns that hold lists (`messages`, `conversations`, `tools`, `history`) are JSON. The separator is the
one of comma, semicolon and tabulator under which the header has the keys of a format.
"""

import codecs
import csv
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.readers.chat_formats import KEYS, header_fault
from svc.dataset.readers.row import MAX_ROW_BYTES, Row, too_large
from svc.dataset.text.decode import decode

_JSON_COLUMNS = {"messages", "conversations", "tools", "history"}
_SEPARATORS = (",", ";", "\t")
_NAMED_SEPARATOR = re.compile(r'"?sep=([^\w\s"]|\t)"?')


def read_csv(stream: BinaryIO) -> Iterator[Row]:
    """Yields every record under the line where it begins."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    lines = _Lines(stream)
    header = _find_header(lines)
    fault = header_fault(header.names)
    reader = csv.reader(lines, delimiter=header.separator, strict=True)
    while True:
        lines.taken.clear()
        number = lines.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            wrong = too_large() if "field larger" in str(error) else _not_csv(str(error))
            yield Row(number, b"".join(lines.taken), error=wrong)
            continue
        raw = b"".join(lines.taken)
        if not cells:
            yield Row(number, raw, blank=True)
            continue
        if fault:
            yield Row(number, raw, error=fault)
            continue
        try:
            yield Row(number, raw, _value(header.names, cells, raw))
        except RowError as error:
            yield Row(number, raw, error=error)


class _Lines:
    """The lines of a file as text; remembers the bytes of those that were taken since `taken` was emptied."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.number = 0
        self.taken: list[bytes] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = self._stream.readline(MAX_ROW_BYTES + 1)
        if not raw:
            raise StopIteration
        self.number += 1
        self.taken.append(raw)
        content = raw.removeprefix(codecs.BOM_UTF8) if self.number == 1 else raw
        return content.decode("utf-8", "surrogateescape")


class _Header:
    def __init__(self, separator: str, names: list[str]) -> None:
        self.separator = separator
        self.names = names

    @property
    def known(self) -> bool:
        return any(set(keys) <= set(self.names) for keys in KEYS.values())


def _find_header(lines: _Lines) -> _Header:
    """The header is the first line that is not blank, or the second after a line that names the separator.

    Spreadsheets write such a line, as `sep=;`, for other spreadsheets.
    """
    written = (line for line in lines if line.strip())
    first = next(written, "")
    named = _NAMED_SEPARATOR.fullmatch(first.rstrip("\r\n"))
    return _read_header(next(written, ""), (named[1],)) if named else _read_header(first, _SEPARATORS)


def _read_header(line: str, separators: tuple[str, ...]) -> _Header:
    headers = []
    for separator in separators:
        try:
            names = next(csv.reader([line], delimiter=separator, strict=True), [])
        except csv.Error:
            continue
        headers.append(_Header(separator, [name.strip() for name in names]))
    return next((header for header in headers if header.known), headers[0] if headers else _Header(",", []))


def _value(names: list[str], cells: list[str], raw: bytes) -> dict[str, Any]:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(
            Code.NOT_UTF8, f"byte 0x{raw[error.start]:02x} is not UTF-8", expected="text in UTF-8"
        ) from error
    if len(cells) != len(names):
        raise RowError(
            Code.WRONG_FORMAT,
            f"{len(cells)} cells where the header has {len(names)}",
            expected="one cell for each column; a cell with separators or line ends stands in quotes",
        )
    value: dict[str, Any] = dict(zip(names, cells, strict=True))
    for column in _JSON_COLUMNS & set(value):
        try:
            value[column] = decode(value[column].encode()) if value[column].strip() else None
        except RowError as error:
            raise RowError(error.code, error.wrong, field=column, expected="a list as JSON text") from error
    return value


def _not_csv(reason: str) -> RowError:
    return RowError(Code.WRONG_FORMAT, f"not CSV: {reason}", expected="cells as RFC 4180 has them")
