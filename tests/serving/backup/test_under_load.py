"""Tests that every snapshot of a home is complete while versions are registered, served and removed."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from mlflow import MlflowClient

from serving.backup.archive import Archive
from serving.backup.backup import Backup
from serving.backup.restore import restore_home
from svc.errors import BusyError
from svc.identity.actor import Actor
from svc.registry.housekeeping import protected, remove_version
from svc.registry.registry import Registry
from svc.settings.settings import Settings
from svc.store.audit import Action, AuditEntry, record_event, verify_chain
from svc.store.database import open_database
from svc.store.desired import read_desired
from svc.version import Format
from tests.serving.backup.conftest import NAME, UsedHome

pytestmark = pytest.mark.slow

SNAPSHOTS = 5


@contextmanager
def going(*steps: Callable[[], None]) -> Iterator[list[Exception]]:
    """Repeat each step in its own thread while the context is active, and yield the list of exceptions."""
    ended, failures = threading.Event(), list[Exception]()

    def repeat(step: Callable[[], None]) -> None:
        while not ended.is_set() and not failures:
            try:
                step()
            except Exception as failure:  # noqa: BLE001 - the test looks at them
                failures.append(failure)

    threads = [threading.Thread(target=repeat, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    try:
        yield failures
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_snapshots_are_complete_while_versions_are_added_served_and_removed(
    used: UsedHome, archive: Archive, tmp_path: Path
) -> None:
    used.promote(used.publish())
    used.publish()
    choosing = threading.Lock()  # `used.promote` does not check, as a server does, that the version is still there
    turn, done = itertools.count(), dict.fromkeys(("published", "promoted", "removed"), 0)

    def publish() -> None:
        used.publish()
        done["published"] += 1

    def promote() -> None:
        with suppress(BusyError), choosing:
            versions = used.registry.versions(NAME)
            used.promote(versions[next(turn) % len(versions)])
            done["promoted"] += 1

    def remove() -> None:
        spare = set(used.registry.versions(NAME)) - protected(used.registry, used.store, NAME).keys()
        for version in sorted(spare)[:-2]:
            with suppress(BusyError), choosing:
                remove_version(used.registry, used.store, version)
                done["removed"] += 1

    def ask() -> None:
        record_event(used.store, AuditEntry(Action.FORGET, "nobody", Actor.local()))
        time.sleep(0.001)

    names = list[str]()
    with going(publish, promote, remove, ask) as failures:
        while len(names) < SNAPSHOTS and not failures:
            names.append(Backup(used.settings, archive).run(keep=SNAPSHOTS).snapshot.name)
    assert failures == []
    assert min(done.values()) > 0
    for name in names:
        restored = Settings(home=tmp_path / name)
        restore_home(archive, archive.find(name), restored.home)
        check_home(restored)


def check_home(settings: Settings) -> None:
    """Check that everything named exists and loads, MLflow knows every version, and the audit log is unaltered."""
    registry, store = Registry.of(settings), open_database(settings.home)
    versions, desired = set(registry.versions(NAME)), read_desired(store, NAME)
    assert desired is not None
    named = {target.version for target in (desired.target, desired.previous) if target}
    assert named | set(registry.tracking.aliases(NAME).values()) <= versions
    for version in versions:
        registry.verify(version, Format.MERGED)
    known = MlflowClient(registry.tracking.uri).search_model_versions(f"name = '{NAME}'")
    assert {version.number for version in versions} <= {int(one.version) for one in known}
    assert verify_chain(store).fault is None
