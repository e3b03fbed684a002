"""Which names are trained now, as the locks of their runs say, and how their newest runs stand, as MLflow knows it.

Locks, because MLflow hears of a run while its loss falls and not while it is merged, judged and quantized, and because
a run that was killed stays open there. Knows nothing of training in other homes but its figures.
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
    _RUNNING: "1 while a run of the name is worked on, in any stage",
    _STARTED: "When the newest run was started",
    _WRITTEN: "When a run that is worked on last wrote a file",
    "svc_training_loss": "Newest loss of the newest run, nats a token",
    "svc_training_heldout_loss": "Newest held-out loss of the newest run, nats an answer token",
    "svc_training_epoch": "Epochs done in the newest run",
    "svc_training_learning_rate": "Newest learning rate of the newest run",
}


class TrainingMetrics(Collector):
    """One sample for each name that was ever trained here.

    Args:
        home: whose runs are looked at.
    """

    def __init__(self, registry: Registry, home: Path) -> None:
        self._tracking = registry.tracking
        self._home = home

    def collect(self) -> Iterable[Metric]:
        """Return the figures of all names; of none if MLflow does not answer, since the server's must not be lost."""
        families = {name: GaugeMetricFamily(name, text, labels=["model"]) for name, text in _GAUGES.items()}
        try:
            runs: list[TrainingRun] | None = list(find_training_runs(self._home))
        except (OSError, IntegrityError):
            log.warning("not known which runs are worked on", exc_info=True)
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
        """Return of each name the run that is worked on, else the one that was started last."""
        figures = {}
        try:
            for name in self._tracking.experiments():
                ids = [run.tracking_run for run in running if run.name == name and run.tracking_run]
                found = [run for run in map(self._tracking.run, ids) if run]
                run = max(found, key=lambda run: run.started_at, default=None) or self._tracking.newest_run(name)
                if run:
                    figures[name] = run
        except (RegistryError, NotFoundError):
            log.warning("no training figures", exc_info=True)
            return {}
        return figures
