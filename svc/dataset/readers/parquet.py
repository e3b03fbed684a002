"""Reads records from Parquet files, keeping only one batch of rows in memory at a time.

Only columns that a format uses are read. Other columns may have types with no Python equivalent.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.readers.columns import READ_KEYS, header_fault
from svc.dataset.readers.row import MAX_ROW_BYTES, Row, too_large

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
