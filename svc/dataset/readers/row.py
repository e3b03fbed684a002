"""One record of a data file, before its format is known, and the limits on what a record may be."""

from dataclasses import dataclass
from typing import Any

from svc.dataset.problem.problem import Code, RowError

MAX_ROW_BYTES = 16 * 2**20
"""Of one line, element, record or cell; a longer one is an error, and is never held in memory."""


@dataclass(frozen=True, slots=True)
class Row:
    """A record: a value, or what is wrong with it; both None where a line is blank.

    Attributes:
        number: line from 1, where the record begins; of a Parquet file the row.
        raw: the bytes of the record as the file has them (of a Parquet row: as JSON); of one that is too large, the
            beginning.
    """

    number: int
    raw: bytes
    value: Any = None
    error: RowError | None = None
    blank: bool = False


def too_large() -> RowError:
    """The error of a record beyond the limit."""
    wrong = f"more than {MAX_ROW_BYTES // 2**20} MiB in one example"
    return RowError(Code.TOO_LARGE, wrong, expected=f"at most {MAX_ROW_BYTES} bytes")
