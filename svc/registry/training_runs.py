"""Lists the training runs in a home folder: which models they train, and which of them are active.

    $SVC_HOME/runs/NAME-KEY/   lock  mlflow.json

A run is active while its lock is held. The run's process holds the lock from the first stage to the last, however long
a step takes. The lock is released if the process dies. This module knows nothing about stages, or about runs in other
home folders.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from svc.files.json_file import read_json_object
from svc.files.lock import is_locked
from svc.version import NAME_PATTERN

RUNS_FOLDER, SWEEPS_FOLDER, RUN_LOCK = "runs", "sweeps", "lock"
_TRACKING_FILE = "mlflow.json"


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """A training run in a home folder, as recorded in the run's own folder.

    Attributes:
        name: the model's name.
        running: whether the run is active.
        tracking_run: id of the run in MLflow; None if the run is inactive or not in MLflow yet.
        written_at: time of the last write to a file in the folder, in seconds since 1970; None for an
            inactive run.
    """

    name: str
    running: bool
    tracking_run: str | None = None
    written_at: float | None = field(default=None, compare=False)


def find_training_runs(home: Path) -> Iterator[TrainingRun]:
    """Yield every training run that has a folder in the home folder.

    Raises:
        OSError: a lock cannot be checked.
        IntegrityError: a file of an active run is damaged.
    """
    for lock in sorted((home / RUNS_FOLDER).glob(f"*/{RUN_LOCK}")):
        name, _, _ = lock.parent.name.rpartition("-")
        if not re.fullmatch(NAME_PATTERN, name):  # it is being removed
            continue
        running = is_locked(lock)
        tracked = read_json_object(lock.with_name(_TRACKING_FILE), default={}) if running else {}
        yield TrainingRun(name, running, tracked.get("run_id"), _written_at(lock.parent) if running else None)


def _written_at(folder: Path) -> float:
    """Return the time of the last write to any file below a folder. Files removed during the search are
    skipped.
    """
    times = [folder.stat().st_mtime]
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            times.append(path.lstat().st_mtime)
    return max(times)
