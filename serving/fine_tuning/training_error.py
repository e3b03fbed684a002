"""Turns the output of a failed training run into an error for the job's owner."""

import re

from serving.fine_tuning.request_rows import JobError
from svc.errors import BaseModelError, DataError, GateError, NotFoundError, RecipeError, RefusedError, TrainingError

_CODES = {
    DataError.exit_code: ("invalid_training_file", "training_file"),
    RecipeError.exit_code: ("invalid_request", None),
    BaseModelError.exit_code: ("invalid_model", "model"),
    NotFoundError.exit_code: ("invalid_model", "model"),
    TrainingError.exit_code: ("training_failed", None),
    RefusedError.exit_code: ("training_failed", None),
    GateError.exit_code: ("training_failed", None),
}
"""Error code and request field, keyed by the exit code of `svc train`."""
_MAX_MESSAGE = 1000
_BEGIN = "error: "
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_PATH = re.compile(r"(?<![\w.:/-])(?:[\w.-]+:/)?/(?:[^\s/'\",:;()]+/)*([^\s/'\",:;()]*)")


def read_error(exit_code: int, log: str) -> JobError:
    """Return the reason why a training process failed.

    Args:
        log: the end of the process's output.
    """
    code, param = _CODES.get(exit_code, ("server_error", None))
    lines = _ANSI.sub("", log).splitlines()
    begins = [number for number, line in enumerate(lines) if line.startswith(_BEGIN)]
    if not begins:
        return JobError(code, "the training failed because of a server error; see the server's log", param)
    wrong, expected = [lines[begins[-1]].removeprefix(_BEGIN)], ""
    for line in lines[begins[-1] + 1 :]:
        if line.startswith("  expected: "):
            expected = line.removeprefix("  expected: ")
        elif line.startswith("  do: "):
            break
        else:
            wrong.append(line.strip())
    message = " ".join(filter(None, wrong))
    return JobError(code, without_paths(f"{message}; expected {expected}" if expected else message), param)


def without_paths(text: str) -> str:
    """Return the text with each path shortened to its last component."""
    return _PATH.sub(r"\1", text)[:_MAX_MESSAGE]
