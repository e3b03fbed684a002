"""Tests which Ray cluster is used, and that one that cannot be reached is refused at once."""

import socket
from unittest.mock import patch

import pytest

from svc.errors import ServerNotRunningError, SettingsError
from svc.ray.cluster import connected, find_address


def test_ray_address_setting_overrides_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "other:6379")
    assert find_address("head:6379") == "head:6379"
    assert find_address(None) == "other:6379"


def test_unset_ray_address_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(SettingsError, match="is not set"):
        find_address(None)


def test_dashboard_url_is_rejected_as_a_ray_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(SettingsError, match="http://head:8265 is the address of Ray's dashboard"):
        find_address(None)


@pytest.mark.slow
def test_connecting_to_a_ray_address_where_nothing_listens_raises_error() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ServerNotRunningError, match=f"no Ray cluster answers at {address}"), connected(address):
            pass


@pytest.mark.slow
def test_ray_event_messages_are_not_printed_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    from ray._private.worker import print_to_stdstream

    event = {"pid": 1, "ip": "", "is_err": False, "lines": ["a node was lost"]}
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        with patch("ray.init"), patch("ray.shutdown"), connected(address):
            print_to_stdstream(event, ignore_prefix=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a node was lost" in captured.err
