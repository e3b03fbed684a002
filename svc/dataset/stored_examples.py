"""Sequences of examples that are stored on disk if there are too many for memory.

A short example takes about 700 bytes of memory. If it is stored on disk, it takes only 8 bytes of memory, for its
position.
"""

import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import overload

import numpy as np
from numpy.typing import NDArray

from svc.dataset.schema.example import ChatExample
from svc.files.scratch import scratch_file

MAX_IN_MEMORY = 100_000
"""Maximum number of examples to keep in memory."""
_BUFFER = 2**20
Places = NDArray[np.int64]


class _Store:
    """A temporary file of examples, which is always deleted when the process exits, even if it is killed."""

    def __init__(self) -> None:
        self._file = scratch_file(self)
        self._waiting = bytearray()
        self._end = 0

    def add(self, examples: Iterable[ChatExample]) -> Places:
        """Write examples, and return the position of each in the file."""
        places = np.fromiter(map(self._write, examples), np.int64)
        self._flush()
        return places

    def read(self, place: int) -> ChatExample:
        """Return the example at a position."""
        handle = self._file.fileno()
        size = int.from_bytes(os.pread(handle, 4, place), "little")
        example: ChatExample = pickle.loads(os.pread(handle, size, place + 4))  # noqa: S301 - written by this process
        return example

    def _write(self, example: ChatExample) -> int:
        content, place = pickle.dumps(example, pickle.HIGHEST_PROTOCOL), self._end
        self._waiting += len(content).to_bytes(4, "little") + content
        self._end += 4 + len(content)
        if len(self._waiting) > _BUFFER:
            self._flush()
        return place

    def _flush(self) -> None:
        self._file.write(self._waiting)
        self._file.flush()
        self._waiting.clear()


class StoredExamples(Sequence[ChatExample]):
    """Examples in a file on disk. An example is read from the file each time it is accessed.

    Args:
        places: position of each example in the file.
    """

    def __init__(self, store: _Store, places: Places) -> None:
        self._store = store
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[ChatExample]:
        return (self._store.read(int(place)) for place in self._places)

    @overload
    def __getitem__(self, index: int) -> ChatExample: ...
    @overload
    def __getitem__(self, index: slice) -> "StoredExamples": ...
    def __getitem__(self, index: int | slice) -> "ChatExample | StoredExamples":
        if isinstance(index, slice):
            return StoredExamples(self._store, self._places[index])
        return self._store.read(int(self._places[index]))

    def select(self, indices: Sequence[int] | Places) -> "StoredExamples":
        """Return the examples with the given indices, in this order."""
        return StoredExamples(self._store, self._places[np.asarray(indices, np.int64)])

    def joined(self, parts: Iterable[Sequence[ChatExample]]) -> "StoredExamples":
        """Return the examples of all parts as one sequence, in order.

        Examples that are not yet in this object's file are appended to the file.
        """
        shared = (
            part._places if isinstance(part, StoredExamples) and part._store is self._store else self._store.add(part)
            for part in parts
        )
        return StoredExamples(self._store, np.concatenate(list(shared)))


def collect(examples: Iterable[ChatExample]) -> Sequence[ChatExample]:
    """Return the examples as a sequence, which is stored on disk if there are more than `MAX_IN_MEMORY`."""
    reading = iter(examples)
    head = list(islice(reading, MAX_IN_MEMORY + 1))
    if len(head) <= MAX_IN_MEMORY:
        return head
    store = _Store()
    return StoredExamples(store, np.concatenate([store.add(head), store.add(reading)]))


def select(examples: Sequence[ChatExample], indices: Sequence[int] | Places) -> Sequence[ChatExample]:
    """Return the examples with the given indices, in this order."""
    if isinstance(examples, StoredExamples):
        return examples.select(indices)
    return [examples[index] for index in indices]


def join(*parts: Sequence[ChatExample]) -> Sequence[ChatExample]:
    """Return the examples of all parts, in order."""
    stored = next((part for part in parts if isinstance(part, StoredExamples)), None)
    return stored.joined(parts) if stored else [example for part in parts for example in part]


def as_tuple(examples: Sequence[ChatExample]) -> Sequence[ChatExample]:
    """Return examples as a tuple if they are in memory. Examples on disk are returned unchanged."""
    return examples if isinstance(examples, StoredExamples) else tuple(examples)
