"""Tests that an outage of the store does not fill the log, and that other errors keep their traceback."""

import logging

import pytest

from svc.errors import RegistryError
from svc.store import outage_log
from svc.store.outage_log import log_store_error
from svc.store.unavailable import StoreUnavailableError

AWAY = StoreUnavailableError(RegistryError("the store at db:5432/x is not responding", todo="check it"))
log = logging.getLogger("tests.outage")


@pytest.fixture(autouse=True)
def _no_earlier_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage_log, "_failed_at", {})


def fail(error: Exception, times: int = 1) -> None:
    for _ in range(times):
        try:
            raise error
        except Exception:  # noqa: BLE001 - any error is logged
            log_store_error(log, "could not read %s", "tiny")


def test_outage_is_logged_once_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    fail(AWAY, times=3)
    (record,) = caplog.records
    assert record.getMessage().startswith("could not read tiny: the store at db:5432/x is not responding")
    assert record.exc_info is None


def test_every_new_outage_is_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(AWAY)
    monkeypatch.setattr(outage_log, "_SAME_OUTAGE_S", 0.0)
    fail(AWAY)
    assert len(caplog.records) == 2


def test_errors_other_than_database_outages_are_logged_with_a_traceback_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fail(OSError("disk full"), times=2)
    assert [bool(record.exc_info) for record in caplog.records] == [True, True]
