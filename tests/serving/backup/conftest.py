"""A home with its own MLflow and store, and fixtures that create versions in it."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import Engine as Store

from serving.backup.archive import Archive
from serving.backup.backup import Backup, BackupReport
from serving.backup.copying import OnBytes, Progress
from serving.backup.restore import restore_home
from svc.dataset.readers.reader import write_examples
from svc.identity.actor import Actor
from svc.registry.registry import HELDOUT_FILE, Registry
from svc.registry.tracking import Tracking
from svc.settings.settings import Settings
from svc.store.audit import Action, AuditEntry
from svc.store.desired import change_desired, read_desired
from svc.version import Alias, Format, Target, VersionId
from tests.new_store import new_store
from tests.svc.chats import chat
from tests.svc.registry.manifests import make_manifest
from tests.svc.registry.model_folder import write_model

NAME = "tickets"


@dataclass
class UsedHome:
    """A home and the operations on it.

    Attributes:
        content: files of every version.
        run: MLflow run that creates the versions.
    """

    settings: Settings
    registry: Registry
    store: Store
    content: dict[str, Path]
    run: str

    def publish(self) -> VersionId:
        """Register a version."""
        return self.registry.publish(NAME, self.run, self.content, make_manifest).id

    def promote(self, version: VersionId) -> None:
        """Make a version the served version, as a server does."""
        seen, target = read_desired(self.store, NAME), Target(version, Format.MERGED)
        entry = AuditEntry(Action.PROMOTE, str(version), Actor.local())
        change_desired(self.store, seen, target, seen.target if seen else None, entry=entry)
        self.registry.tracking.set_alias(version, Alias.PRODUCTION)


@pytest.fixture(scope="session")
def new_mlflow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the path of an MLflow database with one run, and the run's id."""
    path = tmp_path_factory.mktemp("new-mlflow") / "mlflow.db"
    return path, Tracking(f"sqlite:///{path}").start_run("tests", {})


@pytest.fixture
def used(tmp_path: Path, new_mlflow: tuple[Path, str]) -> UsedHome:
    """Return a home that has no versions yet."""
    settings = Settings(home=tmp_path / "home")
    store = new_store(settings.home)
    shutil.copyfile(new_mlflow[0], settings.home / "mlflow.db")
    write_examples(tmp_path / HELDOUT_FILE, [chat("a"), chat("b")])
    content = {"merged": write_model(tmp_path / "work" / "merged"), HELDOUT_FILE: tmp_path / HELDOUT_FILE}
    return UsedHome(settings, Registry.of(settings), store, content, new_mlflow[1])


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    """Return an empty backup archive."""
    return Archive(tmp_path / "backups")


BackUp = Callable[..., BackupReport]


@pytest.fixture
def back_up(used: UsedHome, archive: Archive) -> BackUp:
    """Return a function that backs up the home and takes the arguments of `Backup`."""
    return lambda **options: Backup(used.settings, archive, **options).run(keep=9)


def progress(
    on_start: Callable[[int], object] = lambda total: None, on_bytes: OnBytes = lambda count: None
) -> Progress:
    """Return a copy progress that calls these functions."""

    @contextmanager
    def begin(total: int) -> Iterator[OnBytes]:
        on_start(total)
        yield on_bytes

    return begin


RestoreAs = Callable[[str], Settings]


@pytest.fixture
def restore_as(archive: Archive, tmp_path: Path) -> RestoreAs:
    """Return a function that restores the newest snapshot into a new home."""

    def restore(name: str) -> Settings:
        settings = Settings(home=tmp_path / name)
        restore_home(archive, archive.find(None), settings.home)
        return settings

    return restore
