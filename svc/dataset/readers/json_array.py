"""Reads records from a JSON file that is a single long list, without loading the whole list into memory.

ijson is three times as fast, but it reports neither the line number nor the bytes of an element, which
are needed to report bad lines. It also keeps only the last value of a repeated key, turns half a surrogate pair into
`?`, and stops at the first invalid UTF-8 byte and at the first NaN, even though valid elements may follow.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.readers.row import MAX_ROW_BYTES, Row
from svc.dataset.text.decode import STRICT, explain, not_utf8

_BLOCK = 2**20
_NO_SPACE = re.compile(r"[^ \t\r\n]")


def starts_with_list(head: bytes) -> bool:
    """Return whether the first bytes of a file show that it is a single list rather than JSONL."""
    return head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def read_list(stream: BinaryIO) -> Iterator[Row]:
    """Yield the elements of a list. Reading stops at a syntax error, because the next element cannot be located."""
    return _ListReader(stream).rows()


class _ListReader:
    """Decodes the elements of a list one at a time from a buffer that is refilled as needed."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = ""
        self._at = 0
        self._line = 1
        self._ended = False
        self._lost = False

    def rows(self) -> Iterator[Row]:
        if self._next() == codecs.BOM_UTF8.decode():
            self._at += 1
            self._next()
        self._at += 1  # the bracket, which `starts_with_list` has seen
        mark = self._next()
        if mark == "]":
            self._at += 1
        while mark != "]":
            yield self._element()
            if self._lost:
                return
            mark = self._next()
            if mark not in (",", "]"):
                yield self._fault(f"unexpected {mark!r} after an element" if mark else "the file ends inside the list")
                return
            self._at += 1
        if extra := self._next():
            yield self._fault(f"unexpected {extra!r} after the end of the list")

    def _element(self) -> Row:
        self._next()
        line, wanted = self._line, _BLOCK
        while True:
            try:
                value, end, fault = _decode(self._text, self._at)
                if end < len(self._text) or self._ended:
                    return self._row(line, value, end, fault)
            except (ValueError, RecursionError) as error:
                if self._ended or isinstance(error, RecursionError):
                    return self._give_up(line, explain(error))
            if len(self._text) - self._at > MAX_ROW_BYTES:
                wrong = f"invalid JSON, or an example of more than {MAX_ROW_BYTES // 2**20} MiB; the rest was not read"
                return self._give_up(line, RowError(Code.TOO_LARGE, wrong))
            self._fill(wanted)
            wanted *= 2

    def _row(self, line: int, value: Any, end: int, fault: RowError | None) -> Row:
        text = self._text[self._at : end]
        self._line += text.count("\n")
        self._at = end
        raw = text.encode("utf-8", "surrogateescape")
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            fault = not_utf8(error)
        return Row(line, raw, value, fault)

    def _next(self) -> str:
        """Advance to the next non-whitespace character and return it, or return "" at the end of the file."""
        while True:
            match = _NO_SPACE.search(self._text, self._at)
            end = match.start() if match else len(self._text)
            self._line += self._text.count("\n", self._at, end)
            self._at = end
            if match or self._ended:
                return match[0] if match else ""
            self._fill(_BLOCK)

    def _fill(self, size: int) -> None:
        block = self._stream.read(size)
        self._ended = not block
        self._text = self._text[self._at :] + self._decoder.decode(block, final=self._ended)
        self._at = 0

    def _give_up(self, line: int, error: RowError) -> Row:
        """Return a final row with the error. No later element can be located, because the end of the
        current element is unknown.
        """
        self._lost = True
        rest = self._text[self._at : self._at + MAX_ROW_BYTES]
        return Row(line, rest.encode("utf-8", "surrogateescape"), error=error)

    def _fault(self, wrong: str) -> Row:
        error = RowError(Code.NOT_JSON, f"invalid JSON: {wrong}", expected="a single list of examples")
        return Row(self._line, b"", error=error)


def _decode(text: str, at: int) -> tuple[Any, int, RowError | None]:
    """Return the element at an index, the index where it ends, and an error or None.

    The error is set if Python's own decoder accepts the element but the strict decoder rejects it.
    """
    try:
        return *STRICT.raw_decode(text, at), None
    except RowError as fault:
        return *json.JSONDecoder().raw_decode(text, at), fault
