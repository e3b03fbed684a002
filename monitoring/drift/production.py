"""Drift checks for the versions in production, that is, for the desired version and format of each served model."""

import logging

from sqlalchemy import Engine as Store

from monitoring.drift.check import DriftCheck, only_check, read_reports
from monitoring.drift.quality import QualityReport, read_quality
from monitoring.drift.report import SignalReport
from monitoring.drift.rows import read_drift_states
from svc.errors import BusyError
from svc.registry.registry import Registry
from svc.settings.settings import Settings
from svc.store.database import open_store
from svc.store.deployments import deployed_names
from svc.store.desired import read_desired
from svc.version import Target

log = logging.getLogger(__name__)


def production_targets(store: Store) -> list[Target]:
    """Return the desired version and format of every served model, even if no server is running now."""
    deployments = [read_desired(store, name) for name in deployed_names(store)]
    return [desired.target for desired in deployments if desired is not None]


def read_drift(registry: Registry, store: Store, target: Target) -> tuple[list[SignalReport], QualityReport]:
    """Return a version's latest drift reports and the result of its latest held-out evaluation, for one format.

    Raises:
        NotFoundError: the version does not exist.
        IntegrityError: the registered results differ from the manifest.
    """
    states = read_drift_states(store, target)
    return read_reports(states), read_quality(registry, store, target)


class ProductionChecks:
    """Runs the drift check of every version in production on each call, and caches the references between calls."""

    def __init__(self, settings: Settings) -> None:
        self._home = settings.home
        self._store = open_store(settings)
        self._check = DriftCheck(Registry.of(settings), self._store, settings.request_log)

    def __call__(self) -> None:
        """Check every version in production once, unless another process is already running a check.

        If the check of one version fails, the others are still checked.
        """
        try:
            with only_check(self._home, self._store) as lease:
                for target in production_targets(self._store):
                    try:
                        self._check.run(target, lease)
                    except Exception:  # a bug too: it would prevent the checks of all later models, every time
                        log.exception("could not check %s for drift", target)
        except BusyError:
            log.info("another process is already running the drift check; skipping this run")
