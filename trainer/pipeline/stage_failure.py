"""An exception of a library within a stage, as an error that says stage, library, cause and what to do.

Defects of our own code keep their traceback on the terminal; those of a library go to a file beside the run.
"""

import re
import traceback
from pathlib import Path

from svc.disk import write_whole
from svc.errors import TrainingError
from trainer.recipe.stage import Stage

_OURS = tuple(Path(__file__).parents[2] / package for package in ("svc", "trainer"))
_PACKAGES = re.compile(r"(?:site|dist)-packages/(\w+)")
_CHILD_FRAME = re.compile(r'^  File "(.+)", line \d+', re.MULTILINE)
LOG_FILE = "error.log"
"""In the run's folder: the traceback of the last failure."""


def stage_failure(stage: Stage, error: Exception, run: Path, todo: str) -> TrainingError | None:
    """Return the error to raise in place of a library's; None where our own code failed.

    Args:
        error: as it was caught, with its traceback.
        run: folder of the run, which gets the traceback.
        todo: how to go on.
    """
    library = failed_library(error)
    if library is None:
        return None
    text = "".join(traceback.format_exception(error))
    write_whole(run / LOG_FILE, text.encode("utf-8", "backslashreplace"))
    cause = " ".join(str(error).split()) or "no message"
    return TrainingError(
        f"stage {stage} failed in {library}: {type(error).__name__}: {cause}",
        todo=f"read the traceback in {run / LOG_FILE}; {todo}",
    )


def failed_library(error: BaseException) -> str | None:
    """Return the package that our code called when the exception was raised; None where it was raised by our own code.

    The traceback of an exception from a child process is one of its notes (svc.child_process).
    """
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    for note in getattr(error, "__notes__", ()):
        frames += _CHILD_FRAME.findall(note)
    called = None
    for file in frames:
        if any(Path(file).is_relative_to(package) for package in _OURS):
            called = None
        elif package := _PACKAGES.search(file):
            called = called or package[1]
    return called
