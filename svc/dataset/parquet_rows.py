"""Records of Parquet files, a batch of rows in memory at a time."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from svc.dataset.problem import Code, RowError
from svc.dataset.row import Row

_BATCH_ROWS = 256


def read_parquet(path: Path, on_read: Callable[[int], None]) -> Iterator[Row]:
    """Yields every row; its number stands for the line.

    Args:
        on_read: told how many bytes of the file were read, about.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        size = path.stat().st_size
        with pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            total = max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for place in range(batch.num_rows):
                    number += 1
                    yield _row(number, batch, place)
                on_read(size * number // total)
    except (pyarrow.ArrowException, OSError) as error:
        wrong = RowError(Code.UNREADABLE, f"cannot be read: {str(error)[:200]}", expected="a whole Parquet file")
        yield Row(number + 1, b"", error=wrong)


def _row(number: int, batch: Any, place: int) -> Row:
    try:
        value = batch.slice(place, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return Row(number, b"", error=RowError(Code.NOT_UTF8, "text that is not UTF-8", expected="text in UTF-8"))
    return Row(number, json.dumps(value, ensure_ascii=False, default=str).encode() + b"\n", value)
