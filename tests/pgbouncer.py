"""Runs PgBouncer, if it is installed, in front of a PostgreSQL server for tests."""

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from pydantic import SecretStr

from svc.settings.storage import StoreSettings
from tests.postgresql import SHARED, PostgresServer, unprivileged

_PORT = 6432
_START_TIMEOUT_S = 20.0
_CONFIGURATION = """
[databases]
{database} = host={folder} user=tests
[pgbouncer]
listen_addr =
unix_socket_dir = {folder}
listen_port = {port}
auth_type = any
pool_mode = {mode}
default_pool_size = 20
logfile = {folder}/pgbouncer.log
{more}
"""


@contextmanager
def running_pgbouncer(server: PostgresServer, mode: str, more: str = "") -> Iterator[StoreSettings]:
    """Run PgBouncer in front of the shared database, and yield the settings of a store that is reached through it.

    The test is skipped if PgBouncer is not installed.

    Args:
        mode: pool mode.
        more: further lines of its configuration.
    """
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        pytest.skip("PgBouncer is not installed: apt-get install pgbouncer")
    path = server.folder / "pgbouncer.ini"
    folder = server.folder
    path.write_text(
        _CONFIGURATION.format(database=SHARED, folder=folder, port=_PORT, mode=mode, more=more), encoding="utf-8"
    )
    path.chmod(0o644)  # other tests run commands in this process, which set a umask
    process = subprocess.Popen([program, "--quiet", str(path)], cwd=folder, **unprivileged())
    try:
        _wait_until_it_answers(process, folder)
        yield StoreSettings(url=SecretStr(f"postgresql+psycopg://tests@/{SHARED}?host={folder}&port={_PORT}"))
    finally:
        process.send_signal(signal.SIGQUIT)  # without waiting for its clients
        process.wait()


def _wait_until_it_answers(process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            psycopg.connect(f"host={folder} port={_PORT} user=tests dbname={SHARED}").close()
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return
