"""A single record read from a data file, before its chat format is known, and the size limit for records."""

from dataclasses import dataclass
from typing import Any

from svc.dataset.problem.problem import Code, RowError

MAX_ROW_BYTES = 16 * 2**20
"""Maximum size of a line, element, record or cell, in bytes. Anything larger is an error and is never read into memory
as a whole."""


@dataclass(frozen=True, slots=True)
class Row:
    """A record read from a data file, with the value or the error that decoding it produced. A blank line has neither.

    Attributes:
        number: number of the record's first line, starting at 1; for a Parquet file, the row number.
        raw: the record's bytes in the file, or a Parquet row as JSON. If the record is too large, this is
            only its beginning.
    """

    number: int
    raw: bytes
    value: Any = None
    error: RowError | None = None
    blank: bool = False


def too_large() -> RowError:
    """Return the error for a record that exceeds the size limit."""
    wrong = f"the example is larger than {MAX_ROW_BYTES // 2**20} MiB"
    return RowError(Code.TOO_LARGE, wrong, expected=f"at most {MAX_ROW_BYTES} bytes")
