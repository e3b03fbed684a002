"""Drift checks of the versions in production: for each served model, the desired version and format."""

import logging

from sqlalchemy import Engine as Store

from monitoring.drift.check import LOCK_FILE, DriftCheck, read_reports
from monitoring.drift.report import SignalReport
from monitoring.quality import QualityReport, read_quality
from svc.errors import BusyError
from svc.files.lock import hold_lock
from svc.registry.registry import Registry
from svc.settings import Settings
from svc.store.database import open_database
from svc.store.deployments import deployed_names
from svc.store.desired import read_desired
from svc.store.drift import read_drift_states
from svc.version import Target

log = logging.getLogger(__name__)


def production_targets(store: Store) -> list[Target]:
    """Return the desired target of each model that the home's server serves, or served last."""
    deployments = [read_desired(store, name) for name in deployed_names(store)]
    return [desired.target for desired in deployments if desired is not None]


def read_drift(registry: Registry, store: Store, target: Target) -> tuple[list[SignalReport], QualityReport]:
    """Return the reports from a target's last check, and the result of its last held-out run.

    Raises:
        NotFoundError: the version does not exist.
        IntegrityError: its registered results differ from its manifest.
    """
    states = read_drift_states(store, target)
    return read_reports(states), read_quality(registry, store, target)


class ProductionChecks:
    """Checks all production targets at each call; keeps their references in memory between calls."""

    def __init__(self, settings: Settings) -> None:
        self._lock = settings.home / LOCK_FILE
        self._store = open_database(settings.home)
        self._check = DriftCheck(Registry.of(settings), self._store, settings.request_log)

    def __call__(self) -> None:
        """Check each target once, or none if another process is checking; a failure does not prevent other checks."""
        try:
            with hold_lock(self._lock, "the drift check"):
                for target in production_targets(self._store):
                    try:
                        self._check.run(target)
                    except Exception:  # a bug too: it would prevent the checks of all later models, every time
                        log.exception("the drift check of %s failed", target)
        except BusyError:
            log.info("another process is running the drift check; skipping this one")
