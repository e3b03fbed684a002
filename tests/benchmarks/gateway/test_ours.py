"""Tests that the benchmarked gateway is the real `svc serve`, with upstream, stored rows and key usage."""

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import uvloop
from sqlalchemy import func, select

from benchmarks.gateway.bench import make_ours, until_answered
from benchmarks.gateway.load import Address, Ask, send
from benchmarks.gateway.peers import Ours, Upstream, free_port
from benchmarks.gateway.processes import running
from serving.access.usage import usage_since
from svc.store.database import open_database
from svc.store.tables import RequestRow

pytestmark = pytest.mark.matrix


def test_benchmarked_server_forwards_requests_to_the_engine_and_rejects_requests_without_a_key() -> None:
    with TemporaryDirectory(prefix="gw") as name:
        folder = Path(name)
        upstream = Upstream(folder / "upstream.sock", free_port())
        arguments = [sys.executable, "-m", "benchmarks.gateway.upstream", "--socket", str(upstream.socket)]
        with running([*arguments, "--port", str(upstream.port)], log=folder / "upstream.log"):
            keyed, *_ = make_ours(folder)
            assert isinstance(keyed, Ours)
            (folder / "files").mkdir()
            command, log = keyed.command(upstream, folder / "files"), folder / "ours.log"
            with running(command.arguments, log=log, variables=command.variables) as process:
                until_answered(process, log, command.address, Ask(chunks=1))
                stream = uvloop.run(send(command.address, Ask(chunks=5, stream=True), clients=2, requests=4))
                keyless = uvloop.run(send(Address(command.address.port), Ask(chunks=1), clients=1, requests=1))
        assert (stream.done, stream.failed) == (4, 0), stream.wrong
        assert keyless.failed == 1 and "401" in keyless.wrong
        store = open_database(folder / "files" / "home")
        with store.connect() as connection:
            query = select(func.count()).where(RequestRow.model == "tuned", RequestRow.status == 200)
            assert connection.scalar(query) == 1 + 4
        [used] = usage_since(store, datetime.now(UTC) - timedelta(hours=2))
        assert used.key_id and (used.usage.requests, used.usage.tokens_out) == (5, 1 + 4 * 5)
