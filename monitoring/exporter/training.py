"""Training metrics: which models are being trained, and the latest results of each model's newest run.

Active runs are detected by their locks. MLflow does not show which runs are active: it receives data only during
training, not during merging, evaluation and quantization, and it never closes a killed run. The results come from
MLflow. Runs of other tuneserve home directories that share the same MLflow are included, but never count as active.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from svc.errors import IntegrityError, NotFoundError, RegistryError
from svc.registry.registry import Registry
from svc.registry.tracking import HELDOUT_LOSS, LOSS, RunFigures
from svc.registry.training_runs import TrainingRun, find_training_runs

log = logging.getLogger(__name__)

_RUNNING, _STARTED = "svc_training_running", "svc_training_started_timestamp_seconds"
_WRITTEN = "svc_training_written_timestamp_seconds"
_REPORTED = {
    "svc_training_loss": LOSS,
    "svc_training_heldout_loss": HELDOUT_LOSS,
    "svc_training_epoch": "epoch",
    "svc_training_learning_rate": "learning_rate",
}
_GAUGES = {
    _RUNNING: "1 while a training run of the model is active, in any stage",
    _STARTED: "Unix start time of the newest run; an active run takes precedence over newer runs",
    _WRITTEN: "Unix time at which an active run last wrote a file",
    "svc_training_loss": "Latest loss of the newest run, in nats per token",
    "svc_training_heldout_loss": "Latest held-out loss of the newest run, in nats per answer token",
    "svc_training_epoch": "Completed epochs of the newest run",
    "svc_training_learning_rate": "Latest learning rate of the newest run",
}


class TrainingMetrics(Collector):
    """Collector for the training metrics, with one sample per model.

    Args:
        registry: the registry whose MLflow stores the metrics of the runs.
        home: folder that contains the training runs.
    """

    def __init__(self, registry: Registry, home: Path) -> None:
        self._tracking = registry.tracking
        self._home = home

    def collect(self) -> Iterable[Metric]:
        """Return the training metrics of all models.

        If tuneserve's home folder or MLflow cannot be read, the metrics that come from it are omitted. If an
        error were raised here, the server's metrics would be lost too.
        """
        families = {name: GaugeMetricFamily(name, text, labels=["model"]) for name, text in _GAUGES.items()}
        try:
            runs: list[TrainingRun] | None = list(find_training_runs(self._home))
        except (OSError, IntegrityError):
            log.warning("cannot read the training runs in the home folder", exc_info=True)
            runs = None
        running = [run for run in runs or () if run.running]
        figures = self._figures(running)
        if runs is not None:
            names = {run.name for run in running}
            for name in sorted({*figures, *(run.name for run in runs)}):
                families[_RUNNING].add_metric([name], float(name in names))
            for name in sorted(names):
                written = max(run.written_at or 0.0 for run in running if run.name == name)
                families[_WRITTEN].add_metric([name], written)
        for name, newest in figures.items():
            families[_STARTED].add_metric([name], newest.started_at.timestamp())
            for family, metric in _REPORTED.items():
                if metric in newest.metrics:
                    families[family].add_metric([name], newest.metrics[metric])
        return families.values()

    def _figures(self, running: Sequence[TrainingRun]) -> dict[str, RunFigures]:
        """Return the metrics of each model's active run, or of its newest run if no run is active.

        The result is empty if MLflow is not responding.
        """
        figures = {}
        try:
            for name in self._tracking.experiments():
                ids = [run.tracking_run for run in running if run.name == name and run.tracking_run]
                active = [run for run in map(self._tracking.run, ids) if run]
                run = max(active, key=lambda run: run.started_at, default=None) or self._tracking.newest_run(name)
                if run:
                    figures[name] = run
        except (RegistryError, NotFoundError):
            log.warning("cannot read the metrics of training runs from MLflow", exc_info=True)
            return {}
        return figures
