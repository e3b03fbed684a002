"""Keeps the MLflow run of a run folder. It is created only once, so that a resumed run continues it."""

from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from svc.files.disk import write_whole
from svc.files.json_file import read_record


class TrackedRun(BaseModel):
    """Content of the `mlflow.json` file in a run folder."""

    model_config = ConfigDict(frozen=True)

    run_id: str


def tracked_run(path: Path, start: Callable[[], str]) -> str:
    """Return the id of the MLflow run that belongs to a run folder.

    Args:
        path: the run folder's `mlflow.json`.
        start: starts a run if the folder has none, and returns its id.

    Raises:
        IntegrityError: the file is damaged.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, TrackedRun(run_id=start()).model_dump_json().encode("utf-8"))
    return read_record(path, TrackedRun).run_id
