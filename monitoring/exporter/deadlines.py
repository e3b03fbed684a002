"""Metrics for the expiry times of the server's certificate and API keys, and for the time of the last backup.

All of them are timestamps rather than ages, so that they stay correct while the exporter's page is
cached.
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

from svc.files.backup_snapshots import newest_snapshot_at
from svc.store.audit import Action, read_events
from svc.store.keys import read_keys

log = logging.getLogger(__name__)


class DeadlineMetrics(Collector):
    """Collector that reads the certificate file and the store on each scrape.

    Args:
        certificate: PEM file that starts with the server's own certificate, or None if the server has none.
    """

    def __init__(self, store: Store, certificate: Path | None) -> None:
        self._store = store
        self._certificate = certificate

    def collect(self) -> Iterable[Metric]:
        """Return the metrics. Times that are unknown or cannot be read are omitted."""
        certificate = GaugeMetricFamily(
            "svc_certificate_expiry_timestamp_seconds", "Unix time at which the server's certificate expires", labels=[]
        )
        key = GaugeMetricFamily(
            "svc_key_expiry_timestamp_seconds", "Unix time at which a usable key expires", labels=["key_id"]
        )
        backup = GaugeMetricFamily(
            "svc_backup_timestamp_seconds", "Unix time at which the newest backup was made", labels=[]
        )
        if self._certificate:
            try:
                certificate.add_metric([], _expiry(self._certificate))
            except (OSError, ValueError):
                log.warning("cannot read the certificate %s", self._certificate, exc_info=True)
        try:
            now = datetime.now(UTC)
            for stored in read_keys(self._store):
                if stored.expires_at and stored.usable(now):
                    key.add_metric([stored.id], stored.expires_at.timestamp())
            if newest := self._newest_backup():
                backup.add_metric([], newest)
        except SQLAlchemyError:
            log.warning("cannot read the keys' expiry times or the time of the newest backup", exc_info=True)
        return certificate, key, backup

    def _newest_backup(self) -> float | None:
        """Return the time of the newest backup, or None if `svc backup` has never been run.

        If the backup folder cannot be read or contains no finished backup, return the time at which `svc backup` was
        last started.
        """
        event = next(iter(read_events(self._store, newest=1, action=Action.BACKUP)), None)
        if event is None:
            return None
        made_at = None
        try:
            made_at = newest_snapshot_at(Path(event.subject))
        except OSError:
            log.warning("cannot read the backups in %s", event.subject, exc_info=True)
        return (made_at or datetime.fromisoformat(event.at)).timestamp()


def _expiry(certificate: Path) -> float:
    """Return the expiry time of the first certificate in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file contains no certificate in PEM format.
    """
    from cryptography.x509 import load_pem_x509_certificate

    return load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc.timestamp()
