"""Tests that a valid socket from the service manager is used, and that reports reach the manager."""

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from serving.server import systemd_notify
from serving.server.systemd_notify import ServiceManager, inherited_listener
from svc.errors import SettingsError


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Pass a TCP socket as the service manager does."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setattr(systemd_notify, "_FIRST_DESCRIPTOR", os.dup(listener.fileno()))
        yield listener
        with suppress(OSError):
            os.close(systemd_notify._FIRST_DESCRIPTOR)


def variables(**changed: str) -> dict[str, str]:
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "http"} | changed


def test_inherited_socket_is_used_and_not_passed_on_to_children(passed: socket.socket) -> None:
    passed.listen()
    given = variables() | {"HOME": "/"}
    listener = inherited_listener(given)
    assert listener is not None
    with listener:
        assert listener.getsockname() == passed.getsockname()
        assert not listener.get_inheritable()
    assert given == {"HOME": "/"}


@pytest.mark.parametrize("given", [{}, variables(LISTEN_PID="1")], ids=["none", "of another process"])
def test_no_listener_is_returned_if_no_socket_was_passed(given: dict[str, str]) -> None:
    assert inherited_listener(given) is None


@pytest.mark.parametrize("count", ["0", "2", "many"])
def test_socket_count_other_than_one_is_rejected(count: str) -> None:
    with pytest.raises(SettingsError, match=f"LISTEN_FDS={count}"):
        inherited_listener(variables(LISTEN_FDS=count))


def test_socket_that_is_not_listening_is_rejected(passed: socket.socket) -> None:
    with pytest.raises(SettingsError, match="not a listening TCP socket"):
        inherited_listener(variables())


def test_unix_socket_is_rejected_because_its_requests_need_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        monkeypatch.setattr(systemd_notify, "_FIRST_DESCRIPTOR", listener.fileno())
        with pytest.raises(SettingsError, match="not a listening TCP socket"):
            inherited_listener(variables())


def test_descriptor_that_is_not_a_socket_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "file").open("wb") as file:
        monkeypatch.setattr(systemd_notify, "_FIRST_DESCRIPTOR", file.fileno())
        with pytest.raises(SettingsError, match="did not pass a socket"):
            inherited_listener(variables())


@pytest.fixture
def notices(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
        notices.bind(str(tmp_path / "notify"))
        notices.settimeout(3)
        yield notices


def test_ready_and_stopping_notifications_reach_the_service_manager(notices: socket.socket) -> None:
    given = {"NOTIFY_SOCKET": notices.getsockname(), "HOME": "/"}
    manager = ServiceManager.of(given)
    manager.ready("serving tickets@1")
    assert notices.recv(4096) == b"READY=1\nSTATUS=serving tickets@1"
    manager.stopping()
    assert notices.recv(4096) == b"STOPPING=1"
    assert given == {"HOME": "/"}


@pytest.mark.slow
async def test_watchdog_notifications_are_sent_often_enough(notices: socket.socket) -> None:
    watchdog_s = 0.3
    given = {"NOTIFY_SOCKET": notices.getsockname(), "WATCHDOG_USEC": f"{watchdog_s * 1e6:.0f}"}
    beating = asyncio.create_task(ServiceManager.of(given).run())
    for _ in range(3):
        report = await asyncio.wait_for(asyncio.to_thread(notices.recv, 4096), watchdog_s)
        assert b"WATCHDOG=1" in report.splitlines()
    beating.cancel()


def test_process_continues_if_the_service_manager_is_gone(tmp_path: Path) -> None:
    ServiceManager(str(tmp_path / "gone")).stopping()


def test_no_notifications_are_sent_without_a_service_manager() -> None:
    ServiceManager.of({}).ready("serving")
