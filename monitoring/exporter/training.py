"""How the newest training run of each name stands, as MLflow knows it."""

import logging
import time
from collections.abc import Callable, Iterable

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from svc.errors import RegistryError
from svc.registry.registry import Registry
from svc.registry.tracking import LOSS

log = logging.getLogger(__name__)

_SILENT_S = 900.0
"""A run that reported no loss for so long is not running: a killed one stays open in MLflow. A hundred points are
reported in a run, so this is one point in a run of a day."""
_REPORTED = {"svc_training_loss": LOSS, "svc_training_epoch": "epoch", "svc_training_learning_rate": "learning_rate"}


class TrainingMetrics(Collector):
    """One sample for each name that was ever trained here.

    Args:
        clock: Unix time, seconds.
    """

    def __init__(self, registry: Registry, *, clock: Callable[[], float] = time.time) -> None:
        self._registry = registry
        self._clock = clock

    def describe(self) -> Iterable[Metric]:
        """The families without samples."""
        return _families().values()

    def collect(self) -> Iterable[Metric]:
        """Nothing but the empty families while MLflow does not answer: the server's figures must not be lost too."""
        families = _families()
        try:
            self._fill(families)
        except RegistryError:
            log.warning("no training figures", exc_info=True)
            return _families().values()
        return families.values()

    def _fill(self, families: dict[str, GaugeMetricFamily]) -> None:
        for name in self._registry.tracking.experiments():
            run = self._registry.tracking.newest_run(name)
            if run is None:
                continue
            running = run.open and self._clock() - run.updated_at.timestamp() < _SILENT_S
            families["svc_training_running"].add_metric([name], float(running))
            families["svc_training_started_timestamp_seconds"].add_metric([name], run.started_at.timestamp())
            for family, metric in _REPORTED.items():
                if metric in run.metrics:
                    families[family].add_metric([name], run.metrics[metric])


def _families() -> dict[str, GaugeMetricFamily]:
    documentation = {
        "svc_training_running": "1 while the newest run trains",
        "svc_training_started_timestamp_seconds": "When the newest run was started",
        "svc_training_loss": "Newest loss of the newest run, nats a token",
        "svc_training_epoch": "Epochs done in the newest run",
        "svc_training_learning_rate": "Newest learning rate of the newest run",
    }
    return {name: GaugeMetricFamily(name, text, labels=["model"]) for name, text in documentation.items()}
