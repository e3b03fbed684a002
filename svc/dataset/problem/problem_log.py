"""The problems of one file: any number of them in bounded memory, read back in the order of lines."""

import heapq
import json
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import TextIO, cast

from svc.dataset.problem.problem import Code, Problem, Severity

_KEPT = 2_000  # the rest lies in a temporary file


class ProblemLog:
    """Takes problems in the order of lines in each of two passes: while the file is read, and when all files were."""

    def __init__(self) -> None:
        self._passes = [_Pass()]
        self.severities: Counter[Severity] = Counter()
        self.codes: Counter[Code] = Counter()

    def add(self, problem: Problem) -> None:
        """Takes the next problem of this pass."""
        self._passes[-1].add(problem)
        self.severities[problem.severity] += 1
        self.codes[problem.code] += 1

    def begin_pass(self) -> None:
        """What is added from now on begins at the first line again."""
        self._passes.append(_Pass())

    def __len__(self) -> int:
        return self.severities.total()

    def __iter__(self) -> Iterator[Problem]:
        return heapq.merge(*self._passes, key=lambda problem: problem.line)


class _Pass:
    def __init__(self) -> None:
        self._kept: list[Problem] = []
        self._spilled = 0
        self._file: TextIO | None = None

    def add(self, problem: Problem) -> None:
        if len(self._kept) < _KEPT:
            self._kept.append(problem)
            return
        if self._file is None:
            self._file = cast("TextIO", tempfile.TemporaryFile("w+", encoding="utf-8"))  # noqa: SIM115 - closed with this object
            weakref.finalize(self, self._file.close)
        self._file.write(json.dumps(asdict(problem)) + "\n")
        self._spilled += 1

    def __iter__(self) -> Iterator[Problem]:
        yield from self._kept
        if self._file is None:
            return
        self._file.seek(0)
        for _ in range(self._spilled):
            entry = json.loads(self._file.readline())
            yield Problem(**{**entry, "severity": Severity(entry["severity"]), "code": Code(entry["code"])})
        self._file.seek(0, 2)
