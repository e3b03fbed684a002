"""Log of the problems in one file. It stores any number of problems in bounded memory, ordered by line."""

import os
import sqlite3
from collections import Counter
from collections.abc import Iterator

from svc.dataset.problem.problem import TODO, Code, Problem, Severity, severity_of


class ProblemLog:
    """The problems in a file, ordered by line. Problems on the same line keep the order in which they were added."""

    def __init__(self) -> None:
        self.codes: Counter[Code] = Counter()
        self._database = sqlite3.connect("")  # without a name: in memory, and in a temporary file when it grows
        self._database.execute("CREATE TABLE problem (file, line, code, message, field)")

    def add(self, file: str, line: int, code: Code, message: str, field: str) -> None:
        """Add a problem to the log."""
        self.codes[code] += 1
        self._database.execute(
            "INSERT INTO problem VALUES (?, ?, ?, ?, ?)", (os.fsencode(file), line, code.value, message, field)
        )

    @property
    def errors(self) -> int:
        """Number of problems that make their line unusable for training."""
        return sum(count for code, count in self.codes.items() if severity_of(code) is Severity.ERROR)

    def __len__(self) -> int:
        return self.codes.total()

    def __iter__(self) -> Iterator[Problem]:
        for file, line, name, message, field in self._database.execute("SELECT * FROM problem ORDER BY line, rowid"):
            code = Code(name)
            yield Problem(os.fsdecode(file), line, severity_of(code), code, message, field, TODO[code])
