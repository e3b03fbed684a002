"""Stores training rows as token ids in a memory-mapped Arrow file.

    FOLDER/KEY/   rows.arrow  lengths.npy  complete.json

A resumed run reuses the file of the interrupted run. `complete.json` is written last and contains the hashes of the
other files, so an incomplete or damaged file is detected and rewritten. Imports datasets.
"""

import hashlib
import json
import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.errors import IntegrityError
from svc.files.disk import sync_files, sync_folder, write_whole
from svc.files.json_file import read_json_object
from svc.terminal import console
from trainer.data.chat_template import training_row

_ROWS, _LENGTHS, _COMPLETE = "rows.arrow", "lengths.npy", "complete.json"
_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
_BATCH = 1_000
_READ = 10_000
_SETTINGS = (".json", ".jinja", ".model", ".txt", ".tiktoken")
"""Suffixes of the files in a model folder that determine how examples are tokenized."""


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """The rows to train on.

    Attributes:
        dataset: rows with `input_ids` and `labels`, in memory or memory-mapped.
        lengths: for each example, the number of tokens in its longest row.
    """

    dataset: Dataset
    lengths: NDArray[np.int32]

    @classmethod
    def in_memory(cls, examples: Sequence[Sequence[TokenizedExample]]) -> "TrainingRows":
        """Create in-memory rows from tokenized examples."""
        rows = [training_row(row) for row in chain.from_iterable(examples)]
        return cls(Dataset.from_list(rows), np.fromiter(map(_longest, examples), np.int32))

    @property
    def tokens(self) -> int:
        """Number of tokens in all rows."""
        return int(row_lengths(self.dataset).sum())

    def loaded(self) -> "TrainingRows":
        """Return an in-memory copy of the rows, for processes on other machines."""
        files = [file["filename"] for file in self.dataset.cache_files]
        return TrainingRows(Dataset.from_file(*files, in_memory=True) if files else self.dataset, self.lengths)


def row_lengths(dataset: Dataset) -> NDArray[np.int32]:
    """Return the number of tokens in each row."""
    parts = dataset.with_format("arrow").iter(_READ)
    lengths = [np.asarray(pc.list_value_length(part["input_ids"]), np.int32) for part in parts]
    return np.concatenate(lengths) if lengths else np.zeros(0, np.int32)


def read_or_write_rows(folder: Path, key: str, examples: Iterable[Sequence[TokenizedExample]]) -> TrainingRows:
    """Read the rows of tokenized examples from a file. If the file is missing or incomplete, write it first.

    Args:
        folder: folder for row files. Before a file is written, all other files in the folder are deleted.
        key: hash of everything on which the rows depend (`rows_key`).
        examples: the rows of each example. The examples are iterated over only if the file has to be written.
    """
    place = folder / key
    if rows := _read(place):
        console.print(f"  {len(rows.dataset)} training rows have already been tokenized")
        return rows
    shutil.rmtree(folder, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        _write(place, examples)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # it may be large
        raise
    if rows := _read(place):
        return rows
    raise IntegrityError(f"{place} was changed while it was being written", todo="run the same command again")


def rows_key(base: Path, fingerprint: str, settings: Sequence[Any]) -> str:
    """Return the key that identifies the file with the rows of the given examples.

    Args:
        base: folder with the tokenizer and the chat template.
        fingerprint: fingerprint of the examples.
        settings: other values on which the rows depend, as JSON.
    """
    import tokenizers
    import transformers

    files = sorted(path for path in base.iterdir() if path.suffix in _SETTINGS)
    digests = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    libraries = [transformers.__version__, tokenizers.__version__]
    return hashlib.sha256(json.dumps([fingerprint, digests, libraries, settings], sort_keys=True).encode()).hexdigest()[
        :16
    ]


def _write(place: Path, examples: Iterable[Sequence[TokenizedExample]]) -> None:
    lengths = array("i")

    def counted() -> Iterator[dict[str, list[int]]]:
        for rows in examples:
            lengths.append(_longest(rows))
            yield from map(training_row, rows)

    waiting = counted()
    with pa.OSFile(str(place / _ROWS), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        while batch := list(islice(waiting, _BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, _SCHEMA))
    np.save(place / _LENGTHS, np.frombuffer(lengths, np.int32), allow_pickle=False)
    sync_files(place)
    write_whole(place / _COMPLETE, json.dumps(_hashes(place)).encode())
    sync_folder(place)


def _read(place: Path) -> TrainingRows | None:
    """Return the rows in a folder, or None if they are incomplete or damaged."""
    try:
        if not (place / _COMPLETE).is_file() or read_json_object(place / _COMPLETE) != _hashes(place):
            return None
    except (OSError, IntegrityError):
        return None
    return TrainingRows(Dataset.from_file(str(place / _ROWS)), np.load(place / _LENGTHS, allow_pickle=False))


def _hashes(place: Path) -> dict[str, str]:
    hashes = {}
    for name in (_ROWS, _LENGTHS):
        with (place / name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _longest(rows: Sequence[TokenizedExample]) -> int:
    return max(len(row.input_ids) for row in rows)
