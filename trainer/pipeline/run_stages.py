"""Runs the stages of a run in order, skipping finished stages. Failures become errors that state what to do next."""

import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from svc.errors import DiskSpaceError, InterruptedRunError, SvcError, TrainingError
from svc.files.disk import is_full, write_whole
from svc.terminal import console
from svc.training_progress import ProgressFile, StageBegun
from trainer.model.release_memory import release_memory
from trainer.pipeline.run_folder import Run
from trainer.recipe.stage import Stage

_SPARE_BYTES = 200_000_000  # logs, results, the tracking database
RUN_AGAIN = "run the same command again: finished stages and checkpoints are kept"
_OWN_PACKAGES = tuple(Path(__file__).parents[2] / package for package in ("svc", "trainer"))
_PACKAGES = re.compile(r"(?:site|dist)-packages/(\w+)")
_CHILD_FRAME = re.compile(r'^  File "(.+)", line \d+', re.MULTILINE)
LOG_FILE = "error.log"
"""Name of the file in the run's folder that contains the traceback of the last failure."""


@dataclass(frozen=True, slots=True)
class Step:
    """A stage's work and the disk space that it needs.

    Attributes:
        work: runs the stage and returns its result.
        need: number of bytes that the stage may write.
        outputs: folders that the stage writes.
    """

    work: Callable[[], object]
    need: int = 0
    outputs: tuple[Path, ...] = ()


def run_stages(run: Run, steps: Mapping[Stage, Step], progress: ProgressFile | None = None) -> None:
    """Run the unfinished stages in order.

    Args:
        progress: file in which the start of each stage is recorded.

    Raises:
        InterruptedRunError: a stage was interrupted; running the same command again resumes the run.
        SvcError: a stage failed. Finished stages are kept.
    """
    for stage, step in steps.items():
        if run.done(stage, *step.outputs):
            console.print(f"[dim]{stage}: already done[/dim]")
            continue
        run.require_space(stage, step.need + _SPARE_BYTES)
        console.print(f"[bold]{stage}[/bold]")
        run.begin(stage)
        if progress is not None:
            progress.write(StageBegun(name=stage))
        with _explained(stage, run.folder):
            run.save(stage, step.work())


@contextmanager
def _explained(stage: Stage, run: Path) -> Iterator[None]:
    """Turn a library's exception into an error that names the stage and says what to do next. Unused memory
    is released when the `with` block ends, even without an error.
    """
    try:
        with explained_full_disk(stage, run):
            yield
    except KeyboardInterrupt as error:
        raise InterruptedRunError(f"stage {stage} was interrupted", todo=RUN_AGAIN) from error
    except SvcError:
        raise
    except Exception as error:
        if failure := stage_failure(stage, error, run):
            raise failure from error
        raise
    finally:
        release_memory()


@contextmanager
def explained_full_disk(stage: Stage, run: Path) -> Iterator[None]:
    """Turn a disk-full error into an error that names the stage and its folder."""
    try:
        yield
    except Exception as error:
        if isinstance(error, SvcError) or not is_full(error, run):
            raise
        raise DiskSpaceError(
            f"stage {stage} ran out of disk space in {run}: {error}", todo=f"free up some space there and {RUN_AGAIN}"
        ) from error


def stage_failure(stage: Stage, error: Exception, run: Path) -> TrainingError | None:
    """Return the error to raise in place of a library's exception, or None if our own code raised it.

    Bugs in our own code still show their traceback on the terminal; a library's traceback is written to a
    file.

    Args:
        error: the caught exception with its traceback.
        run: folder of the run, to which the traceback is written.
    """
    library = failed_library(error)
    if library is None:
        return None
    text = "".join(traceback.format_exception(error))
    write_whole(run / LOG_FILE, text.encode("utf-8", "backslashreplace"))
    cause = " ".join(str(error).split()) or "no message"
    return TrainingError(
        f"stage {stage} failed in {library}: {type(error).__name__}: {cause}",
        todo=f"read the traceback in {run / LOG_FILE}; {RUN_AGAIN}",
    )


def failed_library(error: BaseException) -> str | None:
    """Return the name of the package that our code was calling when the exception was raised, or None if our
    own code raised it.

    An exception from a child process has its original traceback in one of its notes (svc.child_process).
    """
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    for note in getattr(error, "__notes__", ()):
        frames += _CHILD_FRAME.findall(note)
    called = None
    for file in frames:
        if any(Path(file).is_relative_to(package) for package in _OWN_PACKAGES):
            called = None
        elif package := _PACKAGES.search(file):
            called = called or package[1]
    return called
