"""Reads CSV records. The header names the keys, and every cell is text.

Cells in list columns (`messages`, `conversations`, `tools`, `history`) contain JSON. The
separator is whichever of comma, semicolon and tab makes the header contain the keys of a format.
"""

import codecs
import csv
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.readers.columns import FORMAT_KEYS, header_fault
from svc.dataset.readers.row import MAX_ROW_BYTES, Row, too_large
from svc.dataset.text.decode import decode, not_utf8

_JSON_COLUMNS = {"messages", "conversations", "tools", "history"}
_SEPARATORS: tuple[str, ...] = (",", ";", "\t")
_NAMED_SEPARATOR = re.compile(r'"?sep=([^\w\s"]|\t)"?')


def read_csv(stream: BinaryIO) -> Iterator[Row]:
    """Yield every record along with the number of its first line."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    lines = _Lines(stream)
    separator, names = _find_header(lines)
    header_error = header_fault(names)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        lines.taken.clear()
        number, cells, value, error = lines.number + 1, [""], None, None
        try:
            cells = next(reader)
            if cells and not header_error:
                value = _value(names, cells, b"".join(lines.taken))
        except StopIteration:
            return
        except csv.Error as reason:
            not_csv = RowError(Code.WRONG_FORMAT, f"invalid CSV: {reason}", expected="CSV as defined in RFC 4180")
            error = too_large() if "field larger" in str(reason) else not_csv
        except UnicodeDecodeError as reason:
            error = not_utf8(reason)
        except RowError as reason:
            error = reason
        error = error or (header_error if cells else None)
        yield Row(number, b"".join(lines.taken), value, error, blank=not cells)


class _Lines:
    """Iterates over a file's lines as text. `taken` collects the bytes read since it was last cleared."""

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


def _find_header(lines: _Lines) -> tuple[str, list[str]]:
    """Return the separator and the column names.

    The header is the first nonblank line. If that line only declares the separator (for example `sep=;`,
    which some spreadsheet programs write), the header is the line after it.
    """
    written = (line for line in lines if line.strip())
    line, separators = next(written, ""), _SEPARATORS
    if named := _NAMED_SEPARATOR.fullmatch(line.rstrip("\r\n")):
        line, separators = next(written, ""), (named[1],)
    headers = []
    for separator in separators:
        with suppress(csv.Error):
            names = next(csv.reader([line], delimiter=separator, strict=True), [])
            headers.append((separator, [name.strip() for name in names]))
    known = (header for header in headers if any(set(keys) <= set(header[1]) for keys in FORMAT_KEYS))
    return next(known, headers[0] if headers else (",", []))


def _value(names: list[str], cells: list[str], raw: bytes) -> dict[str, Any]:
    raw.decode("utf-8")
    if len(cells) != len(names):
        expected = "one cell per column, with quotes around cells that contain separators or line breaks"
        raise RowError(
            Code.WRONG_FORMAT, f"the row has {len(cells)} cells, but the header has {len(names)}", expected=expected
        )
    value: dict[str, Any] = dict(zip(names, cells, strict=True))
    for column in _JSON_COLUMNS & set(value):
        try:
            value[column] = decode(value[column].encode()) if value[column].strip() else None
        except RowError as error:
            raise RowError(error.code, error.wrong, field=column, expected="a list as JSON text") from error
    return value
