"""One record of a data file, before its format is known, and the limit on its size."""

from dataclasses import dataclass
from typing import Any

from svc.dataset.problem.problem import Code, RowError

MAX_ROW_BYTES = 16 * 2**20
"""Maximum size of a line, element, record or cell; a larger one is an error and never in memory as a whole."""


@dataclass(frozen=True, slots=True)
class Row:
    """A record: a value or an error; both None if the line is blank.

    Attributes:
        number: first line of the record, from 1; the row of a Parquet file.
        raw: the record's bytes in the file (a Parquet row: as JSON); if the record is too large, only their beginning.
    """

    number: int
    raw: bytes
    value: Any = None
    error: RowError | None = None
    blank: bool = False


def too_large() -> RowError:
    """Return the error for a record above the limit."""
    wrong = f"more than {MAX_ROW_BYTES // 2**20} MiB in one example"
    return RowError(Code.TOO_LARGE, wrong, expected=f"at most {MAX_ROW_BYTES} bytes")
