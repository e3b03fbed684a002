"""The MLflow run that belongs to a folder: made once, so that what is resumed goes on in it."""

from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from svc.files.disk import write_whole


class TrackedRun(BaseModel):
    """What the folder keeps of it."""

    model_config = ConfigDict(frozen=True)

    run_id: str


def tracked_run(path: Path, start: Callable[[], str]) -> str:
    """The id of a folder's run.

    Args:
        path: the folder's `mlflow.json`.
        start: starts a run, where the folder has none; returns its id.

    Raises:
        ValidationError: the file is damaged.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, TrackedRun(run_id=start()).model_dump_json().encode("utf-8"))
    return TrackedRun.model_validate_json(path.read_bytes()).run_id
