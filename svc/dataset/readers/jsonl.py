"""Reads JSONL records without loading the whole file into memory.

Lines are split only at LF bytes. `str.splitlines` would also split at U+2028, which is valid inside JSON strings.
"""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from svc.dataset.problem.problem import RowError
from svc.dataset.readers.row import MAX_ROW_BYTES, Row, too_large
from svc.dataset.text.decode import decode

_BLOCK = 2**20


def read_jsonl(stream: BinaryIO) -> Iterator[Row]:
    """Yield every line. Memory use is bounded by the longest line, which is at most `MAX_ROW_BYTES`."""
    number = 0
    while raw := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
            _skip_line(stream)
            yield Row(number, raw, error=too_large())
            continue
        content = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        if not content.strip():
            yield Row(number, raw, blank=True)
            continue
        try:
            yield Row(number, raw, decode(content))
        except RowError as error:
            yield Row(number, raw, error=error)


def _skip_line(stream: BinaryIO) -> None:
    while (part := stream.readline(_BLOCK)) and not part.endswith(b"\n"):
        pass
