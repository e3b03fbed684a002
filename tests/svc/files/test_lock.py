"""Tests that a lock is held by one named process, and is free once that process has ended in any way."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest

from svc.errors import BusyError
from svc.files import lock
from svc.files.lock import hold_lock, is_locked, lock_holder, locked_file

HOLDER = """
import sys, time
from pathlib import Path
from svc.files.lock import hold_lock
with hold_lock(Path(sys.argv[1]), "the run", url="http://x"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Run another process that holds the lock, and yield it."""
    arguments = [sys.executable, "-c", HOLDER, str(tmp_path / "lock")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.slow
def test_second_lock_attempt_fails_and_names_the_holder(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    with pytest.raises(BusyError) as caught, hold_lock(tmp_path / "lock", "the run tiny-1"):
        pass
    assert caught.value.wrong == f"the run tiny-1 is in use by process {holder.pid}"
    assert f"kill {holder.pid}" in caught.value.todo


def test_other_processes_can_read_which_process_holds_the_lock(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    assert lock_holder(tmp_path / "lock") == {"pid": holder.pid, "url": "http://x"}


@pytest.mark.slow
def test_failed_lock_attempt_does_not_change_the_recorded_holder(
    tmp_path: Path, holder: "subprocess.Popen[str]"
) -> None:
    with pytest.raises(BusyError), hold_lock(tmp_path / "lock", "it", url="http://y"):
        pass
    assert lock_holder(tmp_path / "lock") == {"pid": holder.pid, "url": "http://x"}


def test_lock_is_released_when_its_holder_is_killed(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert lock_holder(tmp_path / "lock") is None
    with hold_lock(tmp_path / "lock", "it"):
        assert lock_holder(tmp_path / "lock") == {"pid": os.getpid()}


def test_lock_is_released_when_the_locked_block_raises(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hold_lock(tmp_path / "lock", "it"):
        raise ZeroDivisionError
    assert lock_holder(tmp_path / "lock") is None


def test_never_held_lock_has_no_holder(tmp_path: Path) -> None:
    assert lock_holder(tmp_path / "lock") is None


def test_child_process_does_not_inherit_the_lock_of_its_parent(tmp_path: Path) -> None:
    with hold_lock(tmp_path / "lock", "it"):
        child = subprocess.Popen([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"], stdout=-1)
        assert child.stdout is not None
        child.stdout.readline()
    try:
        assert lock_holder(tmp_path / "lock") is None
    finally:
        child.kill()
        child.communicate()


@pytest.mark.slow
def test_reading_the_lock_holder_never_interferes_with_locking(tmp_path: Path) -> None:
    """`svc status` reads the lock holder while `svc serve` starts."""
    path = tmp_path / "lock"
    asking = "import sys; from pathlib import Path; from svc.files.lock import lock_holder\nprint(1, flush=True)\n"
    loop = asking + "while True: lock_holder(Path(sys.argv[1]))"
    with hold_lock(path, "it"):
        pass
    with subprocess.Popen([sys.executable, "-c", loop, str(path)], stdout=-1) as process:
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + 0.5
        try:
            while time.monotonic() < deadline:
                with hold_lock(path, "it"):
                    pass
        finally:
            process.kill()


def test_lock_stays_held_while_a_child_process_has_inherited_the_file_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked_file(path) as file:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[file.fileno()])
    try:
        assert is_locked(path)
    finally:
        child.kill()
        child.wait()
    assert not is_locked(path)


@pytest.mark.slow
def test_locked_file_cannot_be_locked_again(tmp_path: Path) -> None:
    with locked_file(tmp_path / "lock"), pytest.raises(BlockingIOError), locked_file(tmp_path / "lock"):
        pass


def test_lock_is_not_acquired_if_its_folder_is_renamed_while_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that removes a run holds its lock, renames the folder and deletes it."""
    path, waits, take = tmp_path / "run" / "lock", threading.Event(), lock._take

    def take_later(file: IO[str]) -> None:
        waits.set()
        take(file)

    def hold() -> None:
        with hold_lock(path, "the run"):
            pass

    with ThreadPoolExecutor(1) as pool:
        with hold_lock(path, "removing the run"):
            monkeypatch.setattr(lock, "_take", take_later)
            waiting = pool.submit(hold)
            assert waits.wait(10)
            path.parent.rename(tmp_path / ".removed-run")
        with pytest.raises(BusyError, match="the run is in use"):
            waiting.result(10)
