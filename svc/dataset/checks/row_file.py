"""Builds an array piece by piece: in memory while it is small, and then in a temporary file."""

import mmap
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from svc.files.scratch import scratch_file

_MAX_IN_MEMORY = 64 * 2**20
"""Maximum total size, in bytes, of rows kept in memory. It is enough for about 350,000 examples."""


class RowFile:
    """Collects the rows of an array, in memory or in a temporary file.

    Args:
        kind: dtype of a row.
    """

    def __init__(self, kind: np.dtype[Any]) -> None:
        self._kind = kind
        self._waiting = bytearray()
        self._file: BinaryIO | None = None
        self._written = 0

    def __len__(self) -> int:
        """Return the number of rows."""
        return (self._written + len(self._waiting)) // self._kind.itemsize

    def add(self, rows: bytes) -> None:
        """Append one or more rows."""
        self._waiting += rows
        if len(self._waiting) > _MAX_IN_MEMORY:
            self._write()

    def finish(self) -> NDArray[Any]:
        """Return all rows. If they are in a file, it is memory-mapped, so that the system can reclaim the memory."""
        if self._file is None:
            return np.frombuffer(self._waiting, self._kind)
        self._write()
        mapped = mmap.mmap(self._file.fileno(), self._written, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, self._kind)

    def _write(self) -> None:
        self._file = self._file or scratch_file(self)
        self._file.write(self._waiting)
        self._file.flush()
        self._written += len(self._waiting)
        self._waiting.clear()
