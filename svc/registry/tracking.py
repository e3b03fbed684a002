"""Stores training runs and their curves, registered versions, and aliases in MLflow, where users can browse them.

MLflow also allocates version numbers, because it never reuses a number, not even after a deletion. A
version's files are stored elsewhere (see registry.py), and MLflow stores only their path.
"""

import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from svc.errors import NotFoundError, RegistryError
from svc.imports import without_garbage_collection
from svc.version import Alias, VersionId

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

LOSS, HELDOUT_LOSS = "loss", "heldout_loss"
"""Names of the trainer's losses in MLflow (see trainer.callbacks.loss_log)."""
PARENT, RUN_NAME = "mlflow.parentRunId", "mlflow.runName"
"""Tags that the MLflow web UI uses to nest and name runs."""
_HTTP = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
"""MLflow's timeout and retries. With MLflow's defaults, every command would wait for 4 minutes while the tracking
server is down, or for 16 minutes if the server's host is not responding. With these values, a command waits for 3 s or
half a minute, respectively."""
_MAX_METRICS = 1000
"""Maximum number of metrics that MLflow accepts in one request."""


@dataclass(frozen=True, slots=True)
class RunFigures:
    """Metrics of one MLflow run. MLflow cannot tell whether a run is still active, because a killed run stays open in
    MLflow.

    Attributes:
        metrics: the latest value of each metric, keyed by name.
    """

    started_at: datetime
    metrics: dict[str, float]


class Tracking:
    """An MLflow tracking store.

    Args:
        uri: `sqlite:////absolute/path` or the URL of a tracking server.
        artifacts: folder for the artifacts of new experiments, or None to use the tracking server's artifact store.
            With SQLite, None would make MLflow write to the working folder.

    Attributes:
        where: the URI without user name and password, for messages.
    """

    def __init__(self, uri: str, artifacts: Path | None = None) -> None:
        self.uri = uri
        self.where = re.sub("//[^/]*@", "//", uri)
        self.is_remote = uri.startswith(("http://", "https://"))
        self._artifacts = artifacts

    @cached_property
    def _client(self) -> "MlflowClient":
        # Importing MLflow takes a second or two, and its first use of a new database prints every migration.
        for name, value in ({"MLFLOW_DISABLE_TELEMETRY": "true"} | _HTTP).items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        for library in ("mlflow", "mlflow.store.db.utils", "alembic"):
            logging.getLogger(library).setLevel(logging.WARNING)
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # else it reports every retry

        return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Convert MLflow errors raised in the `with` block to this project's errors.

        Raises:
            NotFoundError: MLflow does not know the requested object.
            RegistryError: MLflow is not responding, or responds with an error.
        """
        with without_garbage_collection():
            from mlflow.exceptions import MlflowException
            from requests import RequestException

        try:
            yield
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise NotFoundError(str(error.message)) from error
            if isinstance(error.__context__, RequestException):
                raise RegistryError(
                    f"MLflow at {self.where} is not responding", todo="check `tracking_uri` and the server, then retry"
                ) from error
            reason = str(error.message).replace(self.uri, self.where)
            raise RegistryError(f"MLflow at {self.where} failed: {reason}") from error

    @contextmanager
    def if_available(self) -> Iterator[None]:
        """Log a RegistryError raised in the `with` block, and continue after the block.

        Use this for data that is shown only on MLflow's pages.
        """
        try:
            yield
        except RegistryError as error:
            log.warning("%s; continuing without it", error.wrong)

    def start_run(self, experiment: str, tags: dict[str, str]) -> str:
        """Create a run and return its id.

        Raises:
            RegistryError: MLflow is not responding.
        """
        with self._asking():
            existing = self._client.get_experiment_by_name(experiment)
            folder = str(self._artifacts / experiment) if self._artifacts else None
            experiment_id = existing.experiment_id if existing else self._client.create_experiment(experiment, folder)
            return str(self._client.create_run(experiment_id, tags=tags).info.run_id)

    @contextmanager
    def attach(self, run_id: str) -> Iterator[None]:
        """Mark a run as running for the duration of the `with` block, and as finished or failed afterwards. The block
        runs even if MLflow is not responding.
        """
        with self.if_available(), self._asking():
            self._client.update_run(run_id, status="RUNNING")
        failed = True
        try:
            yield
            failed = False
        finally:
            with self.if_available():
                self.end_run(run_id, failed=failed)

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics to a run.

        Args:
            step: optimizer step, for points on a curve.

        Raises:
            RegistryError: MLflow is not responding.
        """
        self.log_points(run_id, [(step, metrics)])

    def log_points(self, run_id: str, points: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Log the metrics of several optimizer steps, which become points on the run's curves.

        Args:
            points: each is an optimizer step and its metrics.

        Raises:
            RegistryError: MLflow is not responding.
        """
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [Metric(key, value, now, step) for step, figures in points for key, value in figures.items()]
        with self._asking():
            for start in range(0, len(metrics), _MAX_METRICS):
                self._client.log_batch(run_id, metrics=metrics[start : start + _MAX_METRICS])

    def log_file(self, run_id: str, path: Path) -> None:
        """Add a file, such as a plot, to a run, replacing any file of the same name.

        Raises:
            RegistryError: MLflow is not responding.
        """
        with self._asking():
            self._client.log_artifact(run_id, str(path))

    def end_run(self, run_id: str, *, failed: bool = False) -> None:
        """Mark a run as finished or failed.

        Raises:
            RegistryError: MLflow is not responding.
        """
        with self._asking():
            self._client.set_terminated(run_id, "FAILED" if failed else "FINISHED")

    def log_parameters(self, run_id: str, parameters: dict[str, str]) -> None:
        """Log a run's parameters. A parameter that is logged again must have the same value.

        Raises:
            RegistryError: MLflow is not responding.
        """
        from mlflow.entities import Param

        with self._asking():
            self._client.log_batch(run_id, params=[Param(key, value) for key, value in parameters.items()])

    def log_page(self, version: VersionId, run_id: str, page: str) -> str:
        """Add a version's HTML page to its run, and return the page's path in the MLflow web UI.

        Raises:
            RegistryError: MLflow rejected the page.
        """
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_text(run_id, page, _page_name(version))
            experiment = self._client.get_run(run_id).info.experiment_id
        except (MlflowException, OSError) as error:
            raise RegistryError(f"MLflow at {self.where} rejected the HTML report of {version}: {error}") from error
        return f"#/experiments/{experiment}/runs/{run_id}/artifacts/{_page_name(version)}"

    def experiments(self) -> list[str]:
        """Return the names of all experiments except MLflow's default. Each experiment is named after a trained
        model.

        Raises:
            RegistryError: MLflow is not responding.
        """
        with self._asking():
            names = (experiment.name for experiment in self._client.search_experiments())
            return sorted(name for name in names if name != "Default")

    def newest_run(self, experiment: str) -> RunFigures | None:
        """Return an experiment's most recently started run, or None if it has no runs.

        Raises:
            RegistryError: MLflow is not responding.
        """
        with self._asking():
            existing = self._client.get_experiment_by_name(experiment)
            ids, newest = [existing.experiment_id] if existing else [], ["attributes.start_time DESC"]
            runs = self._client.search_runs(ids, order_by=newest, max_results=1) if ids else []
        return _figures(runs[0]) if runs else None

    def run(self, run_id: str) -> RunFigures | None:
        """Return the run with the given id, or None if MLflow does not know it.

        Raises:
            RegistryError: MLflow is not responding.
        """
        with suppress(NotFoundError), self._asking():
            return _figures(self._client.get_run(run_id))
        return None

    def allocate(self, name: str, source: str, run_id: str | None) -> VersionId:
        """Register the next version of a model in MLflow, and return the version's id.

        Args:
            source: location of the version's files. A tracking server rejects folders of other machines, and URLs of
                web servers.

        Raises:
            RegistryError: MLflow is not responding, or rejects the source.
        """
        with self._asking():
            try:
                with self._asking():
                    self._client.get_registered_model(name)
            except NotFoundError:
                self._client.create_registered_model(name)
            version = self._client.create_model_version(name, source=source, run_id=run_id)
        return VersionId(name, int(version.version))

    def adopt(self, version: VersionId, source: str) -> None:
        """Register a version that another machine has published, so that it can have aliases. Does nothing if MLflow
        knows the version, as is the case if the machines share a tracking server.

        Raises:
            RegistryError: MLflow is not responding.
        """
        with suppress(NotFoundError), self._asking():
            self._client.get_model_version(version.name, str(version.number))
            return
        with self._asking():
            while (allocated := self.allocate(version.name, source, run_id=None)).number < version.number:
                self.discard(allocated)
        if allocated != version:
            self.discard(allocated)
            log.warning(
                "MLflow at %s already has a different version %s, so this version cannot have an alias there; use the "
                "same tracking_uri on all machines",
                self.where,
                version,
            )

    def discard(self, version: VersionId) -> None:
        """Delete a version's entry and page from MLflow. Its number is not reused. Unknown versions are ignored.

        Raises:
            RegistryError: MLflow is not responding.
        """
        with suppress(NotFoundError), self._asking():
            if run_id := self._client.get_model_version(version.name, str(version.number)).run_id:
                self._remove_page(version, run_id)
            self._client.delete_model_version(version.name, str(version.number))

    def _remove_page(self, version: VersionId, run_id: str) -> None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        if any(artifact.path == _page_name(version) for artifact in self._client.list_artifacts(run_id)):
            folder = self._client.get_run(run_id).info.artifact_uri
            get_artifact_repository(folder, tracking_uri=self.uri).delete_artifacts(_page_name(version))

    def annotate(self, version: VersionId, description: str, tags: dict[str, str]) -> None:
        """Set a version's description and tags in MLflow.

        Raises:
            RegistryError: MLflow is not responding.
        """
        with self._asking():
            self._client.update_model_version(version.name, str(version.number), description)
            for key, value in tags.items():
                self._client.set_model_version_tag(version.name, str(version.number), key, value)

    def alias(self, name: str, alias: Alias) -> VersionId | None:
        """Return the version that has the given alias, or None if no version has it."""
        return self.aliases(name).get(alias)

    def aliases(self, name: str) -> dict[Alias, VersionId]:
        """Return a model's aliases, limited to those this project uses, or an empty dict if MLflow does not know
        the model.
        """
        with suppress(NotFoundError), self._asking():
            aliases = self._client.get_registered_model(name).aliases
            return {Alias(key): VersionId(name, int(number)) for key, number in aliases.items() if key in set(Alias)}
        return {}

    def set_alias(self, version: VersionId, alias: Alias) -> None:
        """Set an alias, moving it if another version has it.

        Raises:
            NotFoundError: MLflow does not know the version.
            RegistryError: MLflow is not responding.
        """
        with self._asking():
            self._client.set_registered_model_alias(version.name, alias.value, str(version.number))


def _page_name(version: VersionId) -> str:
    return f"{version.name}-{version.number}.html"


def _figures(run: "Run") -> RunFigures:
    return RunFigures(datetime.fromtimestamp(run.info.start_time / 1000, UTC), dict(run.data.metrics))
