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

from svc.errors import IntegrityError, RegistryError
from svc.registry.registry import Registry
from svc.registry.tracking import HELDOUT_LOSS, LOSS, RunFigures
from svc.registry.training_runs import TrainingRun, find_training_runs

log = logging.getLogger(__name__)

_REPORTED = {
    "svc_training_loss": LOSS,
    "svc_training_heldout_loss": HELDOUT_LOSS,
    "svc_training_epoch": "epoch",
    "svc_training_learning_rate": "learning_rate",
}


class TrainingMetrics(Collector):
    """One sample for each name that was ever trained here.

    Args:
        home: whose runs are looked at.
    """

    def __init__(self, registry: Registry, home: Path) -> None:
        self._tracking = registry.tracking
        self._home = home

    def describe(self) -> Iterable[Metric]:
        """The families without samples."""
        return _families().values()

    def collect(self) -> Iterable[Metric]:
        """Without figures while MLflow does not answer: the server's must not be lost too."""
        families = _families()
        runs = self._runs()
        figures = self._figures([run for run in runs or () if run.running])
        if runs is not None:
            running = {run.name for run in runs if run.running}
            for name in sorted({*figures, *(run.name for run in runs)}):
                families["svc_training_running"].add_metric([name], float(name in running))
        for name, run in figures.items():
            families["svc_training_started_timestamp_seconds"].add_metric([name], run.started_at.timestamp())
            for family, metric in _REPORTED.items():
                if metric in run.metrics:
                    families[family].add_metric([name], run.metrics[metric])
        return families.values()

    def _runs(self) -> list[TrainingRun] | None:
        """None where it cannot be said."""
        try:
            return list(find_training_runs(self._home))
        except (OSError, IntegrityError):
            log.warning("not known which runs are worked on", exc_info=True)
            return None

    def _figures(self, running: Sequence[TrainingRun]) -> dict[str, RunFigures]:
        """Of each name the run that is worked on, else the one that was started last."""
        try:
            figures = {}
            for name in self._tracking.experiments():
                ids = [run.tracking_run for run in running if run.name == name and run.tracking_run]
                found = [run for run in map(self._tracking.run, ids) if run]
                run = max(found, key=lambda run: run.started_at, default=None) or self._tracking.newest_run(name)
                if run:
                    figures[name] = run
            return figures
        except RegistryError:
            log.warning("no training figures", exc_info=True)
            return {}


def _families() -> dict[str, GaugeMetricFamily]:
    documentation = {
        "svc_training_running": "1 while a run of the name is worked on, in any stage",
        "svc_training_started_timestamp_seconds": "When the newest run was started",
        "svc_training_loss": "Newest loss of the newest run, nats a token",
        "svc_training_heldout_loss": "Newest held-out loss of the newest run, nats an answer token",
        "svc_training_epoch": "Epochs done in the newest run",
        "svc_training_learning_rate": "Newest learning rate of the newest run",
    }
    return {name: GaugeMetricFamily(name, text, labels=["model"]) for name, text in documentation.items()}
