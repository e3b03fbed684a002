"""Tests that the audit log stores events in order and detects altered rows."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine as Store
from sqlalchemy.exc import IntegrityError

from svc.identity.actor import Actor
from svc.store.audit import (
    FIRST_HASH,
    Action,
    AuditEntry,
    ChainReport,
    append_event,
    read_events,
    record_event,
    verify_chain,
)
from svc.store.database import exclusive, open_database
from tests.builders.actors import ALICE

ENTRY = AuditEntry(Action.PROMOTE, "tickets@2", ALICE, "it is better", {"before": "tickets@1"})


@pytest.fixture
def five(store: Store) -> Store:
    """Return a store with five events."""
    for number in range(1, 6):
        record_event(store, AuditEntry(Action.PROMOTE, f"tickets@{number}", ALICE))
    return store


def tamper(store: Store, statement: str) -> None:
    """Alter the database as someone with write access could."""
    with store.begin() as connection:
        if store.dialect.name == "sqlite":
            for trigger in connection.scalars(sa.text("SELECT name FROM sqlite_master WHERE type = 'trigger'")).all():
                connection.exec_driver_sql(f"DROP TRIGGER {trigger}")
        else:
            connection.exec_driver_sql("SET LOCAL session_replication_role = replica")  # triggers do not run
        connection.exec_driver_sql(statement)


def test_empty_audit_log_passes_verification(store: Store) -> None:
    assert verify_chain(store) == ChainReport(0, FIRST_HASH)


def test_tampered_audit_event_is_displayed_with_its_stored_values(sqlite_store: Store) -> None:
    store = sqlite_store  # in PostgreSQL, a text cannot be replaced by bytes
    record_event(store, ENTRY)
    tamper(store, "UPDATE audit SET actor = X'ff'")
    (event,) = read_events(store, newest=10)
    assert (event.subject, repr(event.actor)) == ("tickets@2", repr(b"\xff"))


def test_audit_event_is_read_back_as_recorded(store: Store) -> None:
    assert record_event(store, ENTRY) == 1
    (event,) = read_events(store, newest=10)
    assert (event.id, event.action, event.subject, event.reason) == (1, "promote", "tickets@2", "it is better")
    assert (event.actor, event.origin, event.details) == ("user:alice", "box", {"before": "tickets@1"})
    assert datetime.now(UTC) - datetime.fromisoformat(event.at) < timedelta(minutes=1)


def test_written_audit_log_passes_verification(five: Store) -> None:
    report = verify_chain(five)
    assert (report.events, report.fault) == (5, None)
    assert report.head == read_events(five, newest=1)[0].hash


@pytest.mark.parametrize("statement", ["UPDATE audit SET reason = 'x' WHERE id = 2", "DELETE FROM audit WHERE id = 5"])
def test_database_rejects_changes_to_the_audit_log(five: Store, statement: str) -> None:
    with pytest.raises(IntegrityError, match="append-only"), five.begin() as connection:
        connection.exec_driver_sql(statement)
    assert verify_chain(five).events == 5


@pytest.mark.parametrize("column", ["at", "action", "subject", "actor", "origin", "reason", "details", "hash"])
def test_modified_audit_row_is_detected(five: Store, column: str) -> None:
    tamper(five, f"UPDATE audit SET {column} = '[]' WHERE id >= 3")
    fault = verify_chain(five).fault
    assert fault is not None
    assert (fault.id, "does not match its content" in fault.wrong) == (3, True)


@pytest.mark.parametrize(
    ("statement", "first"),
    [
        ("DELETE FROM audit WHERE id = 1", 1),
        ("DELETE FROM audit WHERE id IN (2, 4)", 2),
        ("UPDATE audit SET previous_hash = (SELECT hash FROM audit WHERE id = 1) WHERE id = 4", 4),
        ("UPDATE audit SET id = id + 1 WHERE id = 5", 5),
        ("INSERT INTO audit SELECT 6, at, action, subject, actor, origin, reason, details, hash, hash FROM audit", 6),
    ],
)
def test_deleted_reordered_and_inserted_audit_rows_are_detected(five: Store, statement: str, first: int) -> None:
    tamper(five, statement.replace("FROM audit", "FROM audit WHERE id = 5") if "INSERT" in statement else statement)
    report = verify_chain(five)
    assert report.fault is not None
    assert (report.fault.id, report.events) == (first, first - 1)


def test_truncated_audit_log_is_detected_by_comparison_with_a_saved_hash(five: Store) -> None:
    kept = verify_chain(five).head
    record_event(five, ENTRY)
    assert verify_chain(five, expected=kept).fault is None
    tamper(five, "DELETE FROM audit WHERE id >= 5")
    assert verify_chain(five).fault is None
    fault = verify_chain(five, expected=kept).fault
    assert fault is not None
    assert (fault.id, "rows were deleted" in fault.wrong) == (5, True)


def test_audit_event_is_rolled_back_when_its_transaction_fails(store: Store) -> None:
    def write_and_fail() -> None:
        with exclusive(store) as session:
            append_event(session, ENTRY)
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_and_fail()
    assert read_events(store, newest=10) == []


@pytest.mark.parametrize("text", ["\udcff", "a\0b", "é😀"])
def test_unusual_characters_do_not_break_the_audit_hash_chain(store: Store, text: str) -> None:
    record_event(store, AuditEntry(Action.FORGET, text, Actor(text, text), text, {"text": text}))
    assert verify_chain(store) == ChainReport(1, read_events(store, newest=1)[0].hash)


def test_newest_audit_events_are_listed_last(five: Store) -> None:
    assert [event.id for event in read_events(five, newest=2)] == [4, 5]


@pytest.mark.parametrize(("subject", "found"), [("tickets", [1, 2]), ("tickets@2", [2]), ("ticket", []), ("%", [])])
def test_audit_events_can_be_filtered_by_version_and_name(store: Store, subject: str, found: list[int]) -> None:
    for written in ("tickets@1", "tickets@2", "tickets2@1"):
        record_event(store, AuditEntry(Action.PROMOTE, written, ALICE))
    assert [event.id for event in read_events(store, newest=10, subject=subject)] == found


def test_audit_events_can_be_filtered_by_action(five: Store) -> None:
    record_event(five, AuditEntry(Action.COLLECT, "/x", ALICE))
    assert [event.id for event in read_events(five, newest=10, action="gc")] == [6]


def test_audit_events_can_be_filtered_by_time(five: Store) -> None:
    third = datetime.fromisoformat(read_events(five, newest=3)[0].at)
    assert [event.id for event in read_events(five, newest=10, since=third)] == [3, 4, 5]


@pytest.mark.parametrize("details", ["", "[1]", "null", "{"])
def test_audit_event_with_tampered_details_can_still_be_displayed(five: Store, details: str) -> None:
    tamper(five, f"UPDATE audit SET details = '{details}' WHERE id = 3")
    assert read_events(five, newest=3)[0].details == {"unreadable": details}


WRITER = """
import sys
from pathlib import Path
from svc.identity.actor import Actor
from svc.store.audit import Action, AuditEntry, record_event
from svc.store.database import open_database
store = open_database(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for number in range(25):
    record_event(store, AuditEntry(Action.COLLECT, f"{sys.argv[2]}-{number}", Actor("user:x", "box")))
"""


@pytest.mark.slow
def test_concurrent_processes_write_a_single_audit_hash_chain(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate() and process.returncode for process in processes] == [0] * 4
    store = open_database(tmp_path)
    assert (verify_chain(store).events, verify_chain(store).fault) == (100, None)
    events = read_events(store, newest=100)
    assert {event.subject for event in events} == {f"{one}-{number}" for one in range(4) for number in range(25)}
