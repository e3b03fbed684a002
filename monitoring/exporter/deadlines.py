"""When the server's certificate and its keys expire, and when the home was last backed up.

Each is a time and not an age, so that a page that is stored for long stays right.
"""

import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from svc.backup.archive import Archive
from svc.store.audit import Action, read_events
from svc.store.keys import read_keys

log = logging.getLogger(__name__)


class DeadlineMetrics(Collector):
    """Reads the certificate's file and the store at each scrape.

    Args:
        certificate: the server's own first, in PEM; None if it has none.
    """

    def __init__(self, store: Store, certificate: Path | None) -> None:
        self._store = store
        self._certificate = certificate

    def collect(self) -> Iterable[Metric]:
        """Return the times that are known."""
        certificate = GaugeMetricFamily(
            "svc_certificate_expiry_timestamp_seconds", "When the server's certificate expires", labels=[]
        )
        key = GaugeMetricFamily("svc_key_expiry_timestamp_seconds", "When a usable key expires", labels=["key_id"])
        backup = GaugeMetricFamily("svc_backup_timestamp_seconds", "When the newest backup was made", labels=[])
        if self._certificate:
            try:
                certificate.add_metric([], _expiry(self._certificate))
            except (OSError, ValueError):
                log.warning("the certificate %s cannot be read", self._certificate, exc_info=True)
        try:
            now = datetime.now(UTC)
            for found in read_keys(self._store):
                if found.expires_at and found.usable(now):
                    key.add_metric([found.id], found.expires_at.timestamp())
            if newest := self._newest_backup():
                backup.add_metric([], newest)
        except SQLAlchemyError:
            log.warning("no times of keys and backups", exc_info=True)
        return certificate, key, backup

    def _newest_backup(self) -> float | None:
        """Return when the newest backup was made; when it began, if its folder cannot be read from here."""
        event = next(iter(read_events(self._store, newest=1, action=Action.BACKUP)), None)
        if event is None:
            return None
        made_at = None
        try:
            made_at = Archive(Path(event.subject)).newest_at()
        except OSError:
            log.warning("the backups in %s cannot be read", event.subject, exc_info=True)
        return (made_at or datetime.fromisoformat(event.at)).timestamp()


def _expiry(certificate: Path) -> float:
    """Return when the first certificate of a file expires.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no certificate in PEM.
    """
    from cryptography.x509 import load_pem_x509_certificate

    return load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc.timestamp()
