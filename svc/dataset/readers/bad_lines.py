"""Stores the lines that a training run skipped, along with the problem in each line.

    FOLDER/train.jsonl      the bytes of every bad line of train.jsonl
    FOLDER/problems.jsonl   file, line, code and message of each problem

A line can be put back into the training data once it has been fixed.
"""

import json
import shutil
from pathlib import Path

from svc.dataset.problem.problem import RowError
from svc.dataset.readers.file_types import COMPRESSIONS

_INDEX = "problems.jsonl"


class BadLines:
    """Collects bad lines in a folder, replacing those of an earlier run.

    The folder is created only when the first line is added.

    Args:
        folder: folder that is used only for bad lines.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self._names: dict[Path, str] = {}
        shutil.rmtree(folder, ignore_errors=True)

    def add(self, path: Path, number: int, raw: bytes, problem: RowError) -> None:
        """Store one bad line.

        Args:
            raw: the line's bytes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.count += 1
        with (self.folder / self._name(path)).open("ab") as file:
            file.write(raw if raw.endswith(b"\n") or not raw else raw + b"\n")
        entry = {"file": str(path), "line": number, "code": problem.code, "message": problem.wrong}
        with (self.folder / _INDEX).open("a", encoding="utf-8") as index:
            index.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def _name(self, path: Path) -> str:
        """Return the name under which a data file's bad lines are stored: its own name without a compression suffix.

        If that name is already taken, a number is prepended to it.
        """
        if path not in self._names:
            name = path.stem if path.suffix.lower() in COMPRESSIONS else path.name
            name += ".jsonl" if name.endswith(".parquet") else ""
            taken = {_INDEX, *self._names.values()}
            candidates = [name, *(f"{number}-{name}" for number in range(2, len(taken) + 3))]
            self._names[path] = next(candidate for candidate in candidates if candidate not in taken)
        return self._names[path]
