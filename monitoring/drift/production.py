"""What is checked: of each model that is served its version in production, in its format."""

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
    """What each model shall serve that a server of the home serves, or served last."""
    found = [read_desired(store, name) for name in deployed_names(store)]
    return [desired.target for desired in found if desired is not None]


def read_drift(registry: Registry, store: Store, target: Target) -> tuple[list[SignalReport], QualityReport]:
    """What the last check of a version saw, and what the last run of its held-out set says.

    Raises:
        NotFoundError: no such version.
        IntegrityError: its registered results are not what its manifest says.
    """
    kept = read_drift_states(store, target)
    return read_reports(kept), read_quality(registry, store, target)


class ProductionChecks:
    """Checks them all, again and again; what was read of their references stays."""

    def __init__(self, settings: Settings) -> None:
        self._lock = settings.home / LOCK_FILE
        self._store = open_database(settings.home)
        self._check = DriftCheck(Registry.of(settings), self._store, settings.request_log)

    def __call__(self) -> None:
        """One check of each; what is wrong with one keeps no other from being checked."""
        try:
            with hold_lock(self._lock, "the check for drift"):
                for target in production_targets(self._store):
                    try:
                        self._check.run(target)
                    except Exception:  # a defect, too: it would come before the models after this one in every check
                        log.exception("%s is not checked for drift", target)
        except BusyError:
            log.info("another process checks for drift just now")
