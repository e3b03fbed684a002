"""Tests how commands handle responses from a server and from a proxy in front of it."""

from collections.abc import Callable

import httpx
import pytest

from svc.errors import ServerNotRunningError
from svc.remote.remote_server import RemoteServer
from svc.remote.server_url import ServerAddress, read_status

ADDRESS = ServerAddress("https://svc.example")

pytestmark = pytest.mark.parametrize(
    "read",
    [lambda: RemoteServer(ADDRESS).get("/svc/keys"), lambda: read_status(ADDRESS)],
    ids=["RemoteServer", "read_status"],
)


def answer_with(monkeypatch: pytest.MonkeyPatch, answer: Callable[[httpx.Request], httpx.Response]) -> None:
    client = httpx.Client(transport=httpx.MockTransport(answer), base_url=ADDRESS.url)
    monkeypatch.setattr(ServerAddress, "client", lambda _: client)


def test_error_for_an_html_response_from_a_proxy_states_the_response_status(
    read: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(monkeypatch, lambda _: httpx.Response(200, text="<html>sign in</html>"))
    with pytest.raises(ServerNotRunningError, match=r"svc\.example returned status 200 with a body that is not JSON"):
        read()


def test_unreachable_server_error_names_the_cause(read: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused")

    answer_with(monkeypatch, refuse)
    with pytest.raises(ServerNotRunningError, match=r"the server at https://svc\.example is not responding: .*refused"):
        read()
