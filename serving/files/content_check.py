"""Checks the contents of a client's file. `python -m serving.files.content_check PURPOSE PATH` prints a ContentCheck
as JSON.

The server runs this in a separate process, with limits on memory, time and disk space, because a file can contain
anything.
"""

import json
import os
import resource
import sqlite3
import sys
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from serving.files.batch_check import check_batch_file
from serving.files.rows import Purpose
from svc.dataset.problem.problem import Severity, printable
from svc.errors import DataError

MAX_SECONDS = 3600
_MAX_MEMORY = 4 * 2**30
_MAX_DISK = 2 * 2**30  # a list of problems, or a table of examples, that does not fit into memory
_MAX_SHOWN = 20
_MAX_MESSAGE, _MAX_DETAILS = 300, 4000
_HEAD_LINES, _MAX_HEAD_ERRORS = 10_000, 1000
_NICENESS = 10


@dataclass(frozen=True, slots=True)
class ContentCheck:
    """The result of checking a file.

    Attributes:
        usable: whether the file can be used for its purpose.
        details: why the file cannot be used, with line numbers, as text for clients; None if it can be used.
    """

    usable: bool
    details: str | None = None


def check_content(path: Path, purpose: Purpose) -> ContentCheck:
    """Check a file that a client has uploaded."""
    try:
        problems = _training_problems(path) if purpose is Purpose.FINE_TUNE else _batch_problems(path)
    except MemoryError:
        return ContentCheck(False, f"checking the file needs more than {_MAX_MEMORY // 2**30} GiB of memory")
    except sqlite3.Error:
        return ContentCheck(False, "the file has too many problems; check that it is JSONL with one example per line")
    except DataError as error:
        problems = [error.wrong.replace(str(path), "the file")]
    if not problems:
        return ContentCheck(True)
    return ContentCheck(False, printable("; ".join(problem[:_MAX_MESSAGE] for problem in problems))[:_MAX_DETAILS])


def _training_problems(path: Path) -> list[str]:
    """Return descriptions of the first errors that `svc data check` finds, and the number of further errors."""
    from svc.dataset.checks.check import check_files
    from svc.dataset.readers.preferences import read_any_lines

    _, lines = read_any_lines(path, lambda position: None)
    head = [(line.number, line.error) for line in islice(lines, _HEAD_LINES) if line.error]
    if len(head) >= _MAX_HEAD_ERRORS:  # it is probably another kind of file: all checks of 500 MB would take an hour
        problems = [f"line {number}: {error.wrong}" for number, error in head[:_MAX_SHOWN]]
        return [*problems, f"and at least {len(head) - _MAX_SHOWN} more errors"]
    (report,) = check_files([path])
    errors = (problem for problem in report.problems if problem.severity is Severity.ERROR)
    problems = [f"line {problem.line}: {problem.message}" for problem in islice(errors, _MAX_SHOWN)]
    if (more := report.problems.errors - len(problems)) > 0:
        problems.append(f"and {more} more errors")
    return problems


def _batch_problems(path: Path) -> list[str]:
    check = check_batch_file(path)
    found = check.problems
    problems = [f"{f'line {each.line}: ' if each.line else ''}{each.message}" for each in found[:_MAX_SHOWN]]
    if (more := len(found) - len(problems)) > 0:
        problems.append(f"and {'at least ' if check.more_problems else ''}{more} more errors")
    return problems


def _limit_resources() -> None:
    for kind, most in (
        (resource.RLIMIT_AS, _MAX_MEMORY),
        (resource.RLIMIT_CPU, MAX_SECONDS),
        (resource.RLIMIT_FSIZE, _MAX_DISK),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    os.nice(_NICENESS)


def main() -> None:
    _limit_resources()
    purpose, path = sys.argv[1:]
    print(json.dumps(asdict(check_content(Path(path), Purpose(purpose)))))


if __name__ == "__main__":
    main()
