"""Test double for MLflow's runs."""

from datetime import UTC, datetime

from svc.errors import RegistryError
from svc.registry.tracking import RunFigures, Tracking


def run_figures(started_at: float, **metrics: float) -> RunFigures:
    """Return the metrics of a run that started at the given Unix time."""
    return RunFigures(datetime.fromtimestamp(started_at, UTC), metrics)


RUN = run_figures(1000, loss=0.25, epoch=0.5, learning_rate=1e-4)


class TrackedRuns(Tracking):
    """Runs of each name, in the order of their start. A run's id is `NAME/INDEX`.

    Attributes:
        away: whether MLflow is unreachable.
    """

    def __init__(self, **runs: list[RunFigures]) -> None:
        super().__init__("memory")
        self.runs = runs
        self.away = False

    def experiments(self) -> list[str]:
        """Return the names of all experiments."""
        if self.away:
            raise RegistryError("MLflow is not responding")
        return list(self.runs)

    def newest_run(self, experiment: str) -> RunFigures | None:
        """Return the newest run of an experiment."""
        return self.runs[experiment][-1] if self.runs[experiment] else None

    def run(self, run_id: str) -> RunFigures | None:
        """Return the run with the given id."""
        name, _, index = run_id.partition("/")
        return self.runs[name][int(index)] if index else None
