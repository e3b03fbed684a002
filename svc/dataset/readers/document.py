"""Reads a file that is a single document, and returns its text as one row."""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.readers.row import MAX_ROW_BYTES, Row, too_large


def read_document(stream: BinaryIO) -> Iterator[Row]:
    """Yield the document as one row, or nothing if the file is empty."""
    raw = stream.read(MAX_ROW_BYTES + 1)
    if len(raw) > MAX_ROW_BYTES:
        yield Row(1, raw, error=too_large())
    elif raw.strip():
        try:
            yield Row(1, raw, {"text": raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")})
        except UnicodeDecodeError as error:
            wrong = f"byte {error.start} is not UTF-8"
            yield Row(1, raw, error=RowError(Code.NOT_UTF8, wrong, expected="UTF-8"))
