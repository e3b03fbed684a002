"""MLflow: runs with their curves, registered versions and aliases, where people look at them.

Version numbers are allocated here, because MLflow never gives one twice, not even after a deletion. The files of a
version lie elsewhere (registry.py); MLflow knows where.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from svc.errors import NotFoundError, RegistryError
from svc.version import Alias, VersionId

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


LOSS, HELDOUT_LOSS = "loss", "heldout_loss"
"""What a trainer reports to MLflow as its loss (trainer.callbacks.loss_log)."""
PARENT, RUN_NAME = "mlflow.parentRunId", "mlflow.runName"
"""Tags by which MLflow's pages show runs below another one, and name them."""


@dataclass(frozen=True, slots=True)
class RunFigures:
    """How a run stands. Whether somebody works on it is not MLflow's to say: a run that was killed stays open there.

    Attributes:
        metrics: the newest value of each.
    """

    started_at: datetime
    metrics: dict[str, float]


class Tracking:
    """One MLflow tracking store.

    Args:
        uri: `sqlite:////absolute/path` or the URL of a tracking server.
        artifacts: folder for pages of new experiments; None: where the tracking server has them. Without a server and
            without this, MLflow would write below whatever folder a command is started in.
    """

    def __init__(self, uri: str, artifacts: Path | None = None) -> None:
        self.uri = uri
        self._artifacts = artifacts

    @cached_property
    def _client(self) -> "MlflowClient":
        # Importing MLflow takes a second or two, and its first use of a new database prints every migration.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        for library in ("mlflow", "mlflow.store.db.utils", "alembic"):
            logging.getLogger(library).setLevel(logging.WARNING)

        return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Brings MLflow's errors in the body into ours.

        Raises:
            NotFoundError: MLflow does not know what was asked for.
            RegistryError: MLflow does not answer.
        """
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise NotFoundError(str(error.message)) from error
            raise RegistryError(f"MLflow at {self.uri} does not answer: {error.message}") from error

    def start_run(self, experiment: str, tags: dict[str, str]) -> str:
        """Creates a run and returns its id; `attach` makes it the active one."""
        found = self._client.get_experiment_by_name(experiment)
        folder = str(self._artifacts / experiment) if self._artifacts else None
        experiment_id = found.experiment_id if found else self._client.create_experiment(experiment, folder)
        return str(self._client.create_run(experiment_id, tags=tags).info.run_id)

    @contextmanager
    def attach(self, run_id: str) -> Iterator[None]:
        """Marks a run as running inside, and afterwards as finished or failed."""
        import mlflow

        _ = self._client
        mlflow.set_tracking_uri(self.uri)
        with mlflow.start_run(run_id=run_id, log_system_metrics=False):
            yield

    def log_metrics(self, run_id: str, metrics: dict[str, float], step: int = 0) -> None:
        """Adds figures to a run.

        Args:
            step: the optimizer's, of figures that make up a curve.
        """
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        self._client.log_batch(run_id, metrics=[Metric(key, value, now, step) for key, value in metrics.items()])

    def log_file(self, run_id: str, path: Path) -> None:
        """Adds a file to a run, as a picture; one of the same name is replaced."""
        self._client.log_artifact(run_id, str(path))

    def end_run(self, run_id: str, *, failed: bool = False) -> None:
        """Marks a run that was not attached as finished or failed."""
        self._client.set_terminated(run_id, "FAILED" if failed else "FINISHED")

    def log_parameters(self, run_id: str, parameters: dict[str, str]) -> None:
        """Says what a run was made with; said again, it must be the same."""
        from mlflow.entities import Param

        self._client.log_batch(run_id, params=[Param(key, value) for key, value in parameters.items()])

    def log_page(self, version: VersionId, run_id: str, page: str) -> str:
        """Puts the page of a version beside the figures of its run; returns where MLflow's own pages have it.

        Raises:
            RegistryError: MLflow does not take it.
        """
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_text(run_id, page, _page_name(version))
            experiment = self._client.get_run(run_id).info.experiment_id
        except (MlflowException, OSError) as error:
            raise RegistryError(f"MLflow at {self.uri} does not take the page of {version}: {error}") from error
        return f"#/experiments/{experiment}/runs/{run_id}/artifacts/{_page_name(version)}"

    def experiments(self) -> list[str]:
        """Names of everything that was ever trained, but MLflow's own default.

        Raises:
            RegistryError: MLflow does not answer.
        """
        with self._asking():
            return sorted(one.name for one in self._client.search_experiments() if one.name != "Default")

    def newest_run(self, experiment: str) -> RunFigures | None:
        """The run of an experiment that was started last; None where there is none.

        Raises:
            RegistryError: MLflow does not answer.
        """
        with self._asking():
            found = self._client.get_experiment_by_name(experiment)
            newest = ["attributes.start_time DESC"]
            runs = self._client.search_runs([found.experiment_id], order_by=newest, max_results=1) if found else []
        return _figures(runs[0]) if runs else None

    def run(self, run_id: str) -> RunFigures | None:
        """One run; None where MLflow does not know it.

        Raises:
            RegistryError: MLflow does not answer.
        """
        with suppress(NotFoundError), self._asking():
            return _figures(self._client.get_run(run_id))
        return None

    def allocate(self, name: str, source: str, run_id: str) -> VersionId:
        """Registers the next version of a name and returns its number."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.get_registered_model(name)
        except MlflowException:
            self._client.create_registered_model(name)
        version = self._client.create_model_version(name, source=source, run_id=run_id)
        return VersionId(name, int(version.version))

    def discard(self, version: VersionId) -> None:
        """Takes back an allocation with its page; the number stays used. One that MLflow does not know is no error.

        Raises:
            RegistryError: MLflow does not answer.
        """
        with suppress(NotFoundError), self._asking():
            self._remove_page(version, self._client.get_model_version(version.name, str(version.number)).run_id)
            self._client.delete_model_version(version.name, str(version.number))

    def _remove_page(self, version: VersionId, run_id: str) -> None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        if any(artifact.path == _page_name(version) for artifact in self._client.list_artifacts(run_id)):
            folder = self._client.get_run(run_id).info.artifact_uri
            get_artifact_repository(folder, tracking_uri=self.uri).delete_artifacts(_page_name(version))

    def annotate(self, version: VersionId, description: str, tags: dict[str, str]) -> None:
        """What MLflow's page shows of a version."""
        self._client.update_model_version(version.name, str(version.number), description)
        for key, value in tags.items():
            self._client.set_model_version_tag(version.name, str(version.number), key, value)

    def alias(self, name: str, alias: Alias) -> VersionId | None:
        """The version that an alias means, or None."""
        return self.aliases(name).get(alias)

    def aliases(self, name: str) -> dict[Alias, VersionId]:
        """All our aliases of a name; empty for a name that MLflow does not know."""
        with suppress(NotFoundError), self._asking():
            found = self._client.get_registered_model(name).aliases
            return {Alias(key): VersionId(name, int(number)) for key, number in found.items() if key in set(Alias)}
        return {}

    def set_alias(self, version: VersionId, alias: Alias) -> None:
        """Moves an alias."""
        self._client.set_registered_model_alias(version.name, alias.value, str(version.number))


def _page_name(version: VersionId) -> str:
    return f"{version.name}-{version.number}.html"


def _figures(run: "Run") -> RunFigures:
    return RunFigures(datetime.fromtimestamp(run.info.start_time / 1000, UTC), dict(run.data.metrics))
