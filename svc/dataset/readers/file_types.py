"""Reads the records of a data file. The file name determines its container format and compression.

Only columns that a format uses are read. Other columns may have types with no Python equivalent.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.readers.columns import READ_KEYS, header_fault
from svc.dataset.readers.csv import read_csv
from svc.dataset.readers.json_array import read_list, starts_with_list
from svc.dataset.readers.jsonl import read_jsonl
from svc.dataset.readers.promptfoo import read_promptfoo
from svc.dataset.readers.row import MAX_ROW_BYTES, Row, too_large
from svc.errors import DataError

_BATCH_ROWS = 256


def read_parquet(path: Path, on_read: Callable[[int], None]) -> Iterator[Row]:
    """Yield every row, with its row number in place of a line number.

    Args:
        on_read: called with the approximate number of bytes read so far.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        size = path.stat().st_size
        with pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            total = max(file.metadata.num_rows, 1)
            names = file.schema_arrow.names
            fault = header_fault(names)
            read, others = [name for name in names if name in READ_KEYS], sorted(set(names) - READ_KEYS)
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=read):
                for place in range(batch.num_rows):
                    number += 1
                    yield Row(number, b"", error=fault) if fault else _row(number, batch, place, others)
                on_read(size * number // total)
    except (pyarrow.ArrowException, OSError) as error:
        wrong = RowError(
            Code.UNREADABLE, f"cannot read the file: {str(error)[:200]}", expected="a complete Parquet file"
        )
        yield Row(number + 1, b"", error=wrong)


def _row(number: int, batch: Any, place: int, others: list[str]) -> Row:
    """Return one row of a batch.

    Args:
        others: names of the columns that are not read. The row contains them without a value, so that errors
            can mention them.
    """
    try:
        value = batch.slice(place, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return Row(
            number, b"", error=RowError(Code.NOT_UTF8, "the row contains text that is not UTF-8", expected="UTF-8 text")
        )
    except (ValueError, OverflowError) as error:  # dates beyond the year 9999, unknown time zones
        wrong = f"cannot read a value: {str(error)[:200]}"
        return Row(number, b"", error=RowError(Code.WRONG_FORMAT, wrong, expected="a row with text or lists of turns"))
    raw = json.dumps(value, ensure_ascii=False, default=str).encode() + b"\n"
    if len(raw) > MAX_ROW_BYTES:
        return Row(number, raw[:MAX_ROW_BYTES], error=too_large())
    return Row(number, raw, dict.fromkeys(others) | value)


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


def _open_zstd(file: BinaryIO) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(file, "zstd")


_DECOMPRESS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
COMPRESSIONS = tuple(_DECOMPRESS)
CONTAINERS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
DOCUMENTS = (".txt", ".md")
"""Suffixes of files that each contain one document, unless the content looks like JSONL."""
SUITES = (".yaml", ".yml")
"""Suffixes of files that must be named explicitly. In a folder, they are skipped, because they might be recipes."""
_REPORT_EVERY = 256  # rows


def is_data_file(path: Path) -> bool:
    """Return whether a file contains examples, judging by its name."""
    return bare_name(path).endswith(CONTAINERS)


def bare_name(path: Path) -> str:
    """Return the file name in lower case, without its compression suffix."""
    name = path.name.lower()
    return name[: -len(path.suffix)] if path.suffix.lower() in COMPRESSIONS else name


def read_rows(path: Path, on_read: Callable[[int], None] = lambda position: None) -> Iterator[Row]:
    """Yield the records of a file. Files of unknown type are read as JSONL.

    Args:
        on_read: called at intervals with the number of bytes read so far. If the file is compressed, these are
            compressed bytes.

    Raises:
        DataError: the file does not exist or cannot be opened.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
        except OSError as error:
            raise DataError(
                f"cannot open data file {path}: {error.strerror}",
                expected="a file or folder of examples: JSONL, JSON, CSV or Parquet",
                todo="check the path (in a recipe, it is relative to the recipe); write a hub dataset as hf:ORG/NAME",
            ) from error
        if bare_name(path).endswith(".parquet"):
            yield from read_parquet(path, on_read)
            return
        number, decompress = 0, _DECOMPRESS.get(path.suffix.lower())
        try:
            stream = stack.enter_context(io.BufferedReader(decompress(file))) if decompress else file
            for number, row in enumerate(_records(path, stream), start=1):
                if number % _REPORT_EVERY == 0:
                    on_read(file.tell())
                yield row
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            wrong = f"cannot read the rest of the file: {str(error)[:200] or type(error).__name__}"
            yield Row(number + 1, b"", error=RowError(Code.UNREADABLE, wrong, expected="a complete file"))


def _records(path: Path, stream: io.BufferedReader) -> Iterator[Row]:
    name = bare_name(path)
    if name.endswith((".csv", ".tsv")):
        return read_csv(stream)
    if name.endswith(".json") and starts_with_list(stream.peek(4096)):
        return read_list(stream)
    if name.endswith(SUITES):
        return read_promptfoo(path, stream)
    if name.endswith(DOCUMENTS) and stream.peek(1)[:1] != b"{":
        return read_document(stream)
    return read_jsonl(stream)
