"""Tests that one server holds a lease at a time, and that writes of a server that lost it are rejected."""

import time
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from svc.errors import BusyError
from svc.store.database import exclusive
from svc.store.leases import (
    LEASE_S,
    Lease,
    LeaseLostError,
    hold_lease,
    remove_server,
    report_server,
    require_lease,
    running_servers,
)
from svc.store.tables import LeaseRow, ServerRow
from tests.new_store import new_store


def report(store: Store, server: str) -> dict[str, Lease]:
    return report_server(store, server, f"{server}:8000", ["teams"])


def let_pass(store: Store, seconds: float) -> None:
    """Move all stored times into the past."""
    with Session(store) as session, session.begin():
        for lease in session.query(LeaseRow):
            lease.until -= timedelta(seconds=seconds)
        for server in session.query(ServerRow):
            server.seen_at -= timedelta(seconds=seconds)


def test_only_the_first_server_acquires_the_lease(any_store: Store) -> None:
    assert report(any_store, "a") == {"teams": Lease("teams", "a", 1)}
    assert report(any_store, "b") == {}


def test_liveness_report_extends_the_leases_of_its_server(any_store: Store) -> None:
    report(any_store, "a")
    let_pass(any_store, LEASE_S - 1)
    assert report(any_store, "a") == {"teams": Lease("teams", "a", 1)}
    let_pass(any_store, LEASE_S - 1)
    assert report(any_store, "b") == {}


def test_leases_of_a_killed_server_pass_immediately_to_its_replacement_at_the_same_address(any_store: Store) -> None:
    report_server(any_store, "killed", "a:8000", ["teams"])
    assert report_server(any_store, "again", "a:8000", ["teams"]) == {"teams": Lease("teams", "again", 2)}
    assert running_servers(any_store) == {"again": "a:8000"}


def test_two_running_servers_with_the_same_address_are_both_listed(any_store: Store) -> None:
    report_server(any_store, "a", "tuneserve:8000", ["teams"])
    report_server(any_store, "b", "tuneserve:8000", ["teams"])
    assert report_server(any_store, "a", "tuneserve:8000", ["teams"]) == {}
    assert report_server(any_store, "b", "tuneserve:8000", ["teams"]) == {"teams": Lease("teams", "b", 2)}
    assert set(running_servers(any_store)) == {"a", "b"}


def test_lease_generation_increases_when_an_expired_lease_is_granted_to_a_different_server(any_store: Store) -> None:
    report(any_store, "a")
    let_pass(any_store, LEASE_S + 1)
    assert report(any_store, "b") == {"teams": Lease("teams", "b", 2)}
    assert report(any_store, "a") == {}


def test_late_liveness_report_extends_an_expired_lease_that_no_other_server_acquired(any_store: Store) -> None:
    report(any_store, "a")
    let_pass(any_store, LEASE_S + 1)
    assert report(any_store, "a") == {"teams": Lease("teams", "a", 1)}


def test_lease_of_a_stopped_server_is_available_immediately(any_store: Store) -> None:
    report(any_store, "a")
    remove_server(any_store, "a")
    assert report(any_store, "b") == {"teams": Lease("teams", "b", 2)}


def test_write_with_a_lost_lease_is_rejected(any_store: Store) -> None:
    lost = report(any_store, "a")["teams"]
    let_pass(any_store, LEASE_S + 1)
    taken = report(any_store, "b")["teams"]
    with exclusive(any_store) as session:
        require_lease(session, taken)
        with pytest.raises(LeaseLostError, match="taken over teams"):
            require_lease(session, lost)


def test_write_with_an_expired_lease_is_accepted_if_no_other_server_acquired_it(any_store: Store) -> None:
    lease = report(any_store, "a")["teams"]
    let_pass(any_store, LEASE_S + 1)
    with exclusive(any_store) as session:
        require_lease(session, lease)


def test_only_servers_that_reported_recently_are_listed_as_running(any_store: Store) -> None:
    report(any_store, "a")
    let_pass(any_store, LEASE_S + 1)
    report(any_store, "b")
    report(any_store, "c")
    assert list(running_servers(any_store)) == ["b", "c"]
    report(any_store, "a")
    assert list(running_servers(any_store)) == ["a", "b", "c"]


def test_servers_that_have_not_reported_for_a_day_are_deleted(any_store: Store) -> None:
    with Session(any_store) as session, session.begin():
        long_ago = datetime.now(UTC) - timedelta(days=2)
        session.add(ServerRow(id="old", address="old:8000", started_at=long_ago, seen_at=long_ago))
    report(any_store, "a")
    with Session(any_store) as session:
        assert [row.id for row in session.query(ServerRow)] == ["a"]


def hold(store: Store) -> AbstractContextManager[Lease | None]:
    return hold_lease(store, "*work", "the work")


def test_held_lease_cannot_be_acquired_by_a_second_holder_until_it_is_released(postgresql_store: Store) -> None:
    refused = pytest.raises(BusyError, match=r"the work is in use by process \d+ on [\w.-]+\n")
    with hold(postgresql_store), refused, hold(postgresql_store):
        pass
    with hold(postgresql_store) as lease:
        assert lease and lease.generation == 2


@pytest.mark.slow
def test_lease_is_extended_while_it_is_held(postgresql_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svc.store.leases.LEASE_S", 0.3)
    with hold(postgresql_store) as lease:
        time.sleep(0.6)
        with exclusive(postgresql_store) as session:
            require_lease(session, lease)
            assert session.get_one(LeaseRow, "*work").until > datetime.now(UTC)


def test_write_fails_if_a_different_process_has_acquired_the_lease(postgresql_store: Store) -> None:
    def write() -> None:
        with hold(postgresql_store) as lease:
            let_pass(postgresql_store, LEASE_S + 1)
            report_server(postgresql_store, "b", "b:8000", ["*work"])
            with exclusive(postgresql_store) as session:
                require_lease(session, lease)

    with pytest.raises(BusyError, match="another process took over the work"):
        write()


@pytest.mark.slow
def test_lost_lease_is_not_renewed_after_its_new_holder_has_released_it(
    postgresql_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svc.store.leases.LEASE_S", 0.6)
    with hold(postgresql_store):
        with exclusive(postgresql_store) as session:
            row = session.get_one(LeaseRow, "*work")
            row.holder, row.generation, row.until = "b", row.generation + 1, datetime(2020, 1, 1, tzinfo=UTC)
        time.sleep(0.6)
        with hold(postgresql_store) as lease:
            assert lease and lease.generation == 3


def test_previous_holder_does_not_release_the_lease_of_the_new_holder_on_exit(postgresql_store: Store) -> None:
    with hold(postgresql_store):
        let_pass(postgresql_store, LEASE_S + 1)
        report_server(postgresql_store, "b", "b:8000", ["*work"])
    with pytest.raises(BusyError), hold(postgresql_store):
        pass


def test_no_lease_is_created_with_a_sqlite_store(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    with hold(store) as lease:
        assert lease is None
    with Session(store) as session:
        assert session.query(LeaseRow).count() == 0
