"""Records which MLflow run belongs to a run folder, and sends the run's curves to MLflow.

The run is created only once, so that a resumed run continues it. If the MLflow server is down or slow, training is
neither stopped nor delayed.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue

from pydantic import BaseModel, ConfigDict

from svc.errors import RegistryError
from svc.files.disk import write_whole
from svc.files.json_file import read_record
from svc.registry.tracking import Tracking
from svc.terminal import console
from trainer.pipeline.reports import Report


class TrackedRun(BaseModel):
    """Contents of the `mlflow.json` file in a run folder."""

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


@contextmanager
def sending_curve(tracking: Tracking, run_id: str) -> Iterator[Report]:
    """Yield a function that takes an optimizer step and its metrics, and queues them for a thread that sends them to
    MLflow.

    Metrics that could not be sent are sent again with the next metrics, and at the end of the `with` block. If MLflow
    is still not responding at that point, the metrics are lost, and a warning is printed.
    """
    sender = _Sender(tracking, run_id)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow") as thread:
        sending = thread.submit(sender.send)

        def send(step: int, metrics: Mapping[str, float]) -> None:
            nonlocal sending
            sender.queue.put((step, metrics))
            if sending.done():  # else each point would wait for its own timeout at the end of the block
                sending = thread.submit(sender.send)

        try:
            yield send
        finally:
            thread.submit(sender.send)
    if sender.unsent:
        console.print(
            f"steps whose metrics are missing from MLflow at {tracking.where}: {len(sender.unsent)}",
            style="yellow",
            soft_wrap=True,
        )


class _Sender:
    """Sends a training run's metrics to MLflow. `send` must always be called from the same thread."""

    def __init__(self, tracking: Tracking, run_id: str) -> None:
        self.queue = SimpleQueue[tuple[int, Mapping[str, float]]]()
        self.unsent: list[tuple[int, Mapping[str, float]]] = []
        self._tracking = tracking
        self._run_id = run_id
        self._is_reported = False

    def send(self) -> None:
        """Send the metrics of all queued steps, including those that could not be sent earlier."""
        while True:
            try:
                self.unsent.append(self.queue.get_nowait())
            except Empty:
                break
        if not self.unsent:
            return
        try:
            self._tracking.log_points(self._run_id, self.unsent)
        except RegistryError as error:
            if not self._is_reported:
                console.print(f"{error.wrong}; training continues", style="yellow", soft_wrap=True)
            self._is_reported = True
        else:
            self.unsent.clear()
