"""Tests `svc serve` as a process: its claims, its start, and that it leaves nothing behind when it stops."""

import asyncio
import gc
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine as Store

from serving.models import deployment
from serving.server import server
from serving.server.http_server import HttpServer
from svc.errors import BusyError, EngineError, IntegrityError, RegistryError, SettingsError
from svc.settings.settings import Settings
from svc.store.desired import Desired, change_desired, read_desired
from svc.store.swaps import SwapOutcome, find_swap
from svc.store.unavailable import StoreUnavailableError
from svc.version import Alias
from tests.serving.control import ask, until
from tests.serving.engine_double import EngineDouble
from tests.serving.engine_park import PLAN
from tests.serving.home import Home
from tests.serving.versions import NAME, target

pytestmark = pytest.mark.slow


@asynccontextmanager
async def started(home: Home) -> AsyncIterator[tuple[asyncio.Task[None], httpx.AsyncClient]]:
    """Start a server and yield its task and client. The test stops the server."""
    with server.claim(home.settings) as claim:
        async with httpx.AsyncClient(base_url=claim.url, timeout=10) as client:
            task = asyncio.create_task(home.serve(claim, f"{NAME}@1"))
            yield task, client
            assert task.done()


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


async def end(task: asyncio.Task[None]) -> None:
    """Wait for a server that was told to stop, and check that it succeeds."""
    async with asyncio.timeout(3):
        await asyncio.wait({task})
    task.result()


def slow(double: EngineDouble) -> None:
    double.token_delay_s = 0.05


def drain_for(home: Home, seconds: float) -> None:
    home.settings = home.settings.model_copy(
        update={"serve": home.settings.serve.model_copy(update={"drain_s": seconds})}
    )


async def test_started_server_answers_and_reports_its_status(home: Home) -> None:
    async with home.serving(f"{NAME}@1") as client:
        answer = await ask(client, stream=True)
        assert (answer.status, answer.version, answer.words) == (200, f"{NAME}@1", {"1"})
        status = await _status(client)
    assert (status["model"], status["version"], status["format"]) == (NAME, f"{NAME}@1", "merged")
    assert status["engine"] == {"state": "ready", "restarts": 0, "last_error": None, "plan": PLAN}
    assert status["last_swap"] is None


async def test_status_shows_in_memory_values_while_the_store_is_unavailable(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(store: Store, name: str, *, server: str) -> None:
        raise StoreUnavailableError(RegistryError("the store at db:5432/x is not responding", todo="check it"))

    monkeypatch.setattr(deployment, "last_swap", fail)
    async with home.serving(f"{NAME}@1") as client:
        status = await _status(client)
    assert (status["version"], status["engine"]["state"], status["store"]) == (f"{NAME}@1", "ready", "unavailable")
    assert [status[key] for key in ("last_swap", "rollout", "holdout")] == [None] * 3


async def test_event_loop_lag_is_measured_from_server_start(home: Home) -> None:
    async with home.serving(f"{NAME}@1") as client, asyncio.timeout(3):
        count = "0"
        while float(count) == 0:
            page = (await client.get("/metrics")).text
            [line] = [line for line in page.splitlines() if line.startswith("svc_event_loop_lag_seconds_count")]
            count = line.split()[1]


async def test_imported_objects_are_excluded_from_garbage_collection(home: Home) -> None:
    before = gc.get_freeze_count()
    async with home.serving(f"{NAME}@1"):
        await until(lambda: gc.get_freeze_count() > before)


async def test_status_shows_the_last_swap(home: Home) -> None:
    async with home.serving(f"{NAME}@1") as client:
        seen = read_desired(home.store, NAME)
        assert seen is not None
        change_desired(home.store, seen, target(2), seen.target)
        status = await _status_with_outcome(client)
    assert (status["version"], status["previous"]) == (f"{NAME}@2", f"{target(1)}")
    assert (status["last_swap"]["to"], status["last_swap"]["outcome"]) == (str(target(2)), "succeeded")


async def test_swap_result_that_cannot_be_written_is_still_shown_in_the_status(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("serving.rollout.journal.end_swap", fail)
    monkeypatch.setattr("serving.rollout.journal._CLOSE_S", 0.05)
    async with home.serving(f"{NAME}@1") as client:
        seen = read_desired(home.store, NAME)
        assert seen is not None
        wanted = change_desired(home.store, seen, target(2), seen.target)
        status = await _status_with_outcome(client)
    assert (status["last_swap"]["generation"], status["last_swap"]["outcome"]) == (wanted.generation, "succeeded")
    swap = find_swap(home.store, NAME)
    assert swap is not None and swap.result is None


async def _status(client: httpx.AsyncClient) -> dict[str, Any]:
    """Return the status of the server's only model."""
    (status,) = (await client.get("/svc/status")).json()["models"]
    return dict(status)


async def _status_with_outcome(client: httpx.AsyncClient) -> dict[str, Any]:
    async with asyncio.timeout(3):
        while True:
            status: dict[str, Any] = await _status(client)
            if status["last_swap"] and status["last_swap"]["outcome"]:
                return status


async def test_engine_death_is_in_status_and_metrics(home: Home) -> None:
    async with home.serving(f"{NAME}@1") as client:
        home.park.failing_starts = 1000
        home.park.engines[0].kill()
        async with asyncio.timeout(3):
            while (status := await _status(client))["engine"]["state"] != "failed":
                pass
        metrics = (await client.get("/metrics")).text
    assert "exited with code" in status["engine"]["last_error"]
    assert 'svc_engine_state{model="tuned",state="failed"} 1.0' in metrics


async def test_metrics_contain_no_created_timestamp_series(home: Home) -> None:
    async with home.serving(f"{NAME}@1") as client:
        await ask(client, stream=False)
        assert "_created" not in (await client.get("/metrics")).text


async def test_starting_server_responds_that_it_is_starting(home: Home) -> None:
    home.park.start_delay_s = 10
    async with started(home) as (task, client):
        answer = await ask(client, stream=False)
        assert (answer.status, answer.error) == (503, "engine_unavailable")
        await until(lambda: home.park.engines)
        assert (await _status(client))["engine"]["state"] == "starting"
        task.cancel()
        await asyncio.wait({task})


async def test_signal_stops_a_starting_server(home: Home) -> None:
    home.park.start_delay_s = 10
    async with started(home) as (task, _):
        await until(lambda: home.park.alive)
        terminate()
        await end(task)
    assert home.park.alive == 0
    assert len(home.park.engines) == 1


async def test_running_requests_complete_after_a_stop_signal(home: Home) -> None:
    home.park.prepare = slow
    async with started(home) as (task, client):
        await home.ready.wait()
        running = [asyncio.create_task(ask(client, stream=stream)) for stream in (True, False)]
        await until(lambda: home.park.double.running == 2)
        terminate()
        answers = await asyncio.gather(*running)
        await end(task)
    assert [(answer.status, answer.error, answer.words) for answer in answers] == [(200, None, {"1"})] * 2
    assert (home.park.alive, len(home.park.engines)) == (0, 1)


async def test_second_stop_signal_cancels_running_requests(home: Home) -> None:
    async with started(home) as (task, client):
        await home.ready.wait()
        home.park.double.token_delay_s = 10
        running = asyncio.create_task(ask(client, stream=True))
        await until(lambda: home.park.double.running)
        terminate()
        await asyncio.sleep(0.15)
        assert home.park.alive == 1
        terminate()
        await end(task)
        await asyncio.wait({running})
        assert running.exception() or running.result().error
    assert home.park.alive == 0


async def test_draining_server_answers_requests_while_its_health_endpoint_reports_draining(home: Home) -> None:
    drain_for(home, 30.0)
    async with started(home) as (task, client):
        await home.ready.wait()
        assert (await client.get("/health")).status_code == 200
        terminate()
        await asyncio.sleep(0.1)
        health = await client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "draining"})
        assert (await client.get("/health/live")).status_code == 200
        async with httpx.AsyncClient(base_url=client.base_url) as new:
            assert (await ask(new, stream=True)).status == 200
        terminate()
        await end(task)
    assert home.park.alive == 0


async def test_server_stops_by_itself_after_it_has_drained(home: Home) -> None:
    drain_for(home, 0.5)
    async with started(home) as (task, client):
        await home.ready.wait()
        terminate()
        await asyncio.sleep(0.2)
        assert (await ask(client, stream=False)).status == 200
        await end(task)
        with pytest.raises(httpx.ConnectError):
            await client.get("/health")


async def test_second_signal_ends_the_drain_period_but_running_requests_complete(home: Home) -> None:
    drain_for(home, 30.0)
    home.park.prepare = slow
    async with started(home) as (task, client):
        await home.ready.wait()
        terminate()
        running = asyncio.create_task(ask(client, stream=True))
        await until(lambda: home.park.double.running)
        terminate()
        answer = await running
        await end(task)
    assert (answer.status, answer.error) == (200, None)


async def test_draining_server_leaves_its_engine_running_if_a_signal_requests_it(home: Home) -> None:
    drain_for(home, 0.2)
    async with started(home) as (task, _):
        await home.ready.wait()
        os.kill(os.getpid(), signal.SIGUSR1)
        await end(task)
    assert len(home.park.left) == 1
    async with home.serving():
        pass


@pytest.mark.parametrize("path", ["/collective_rpc", "/reset_prefix_cache"])
async def test_swap_cancelled_by_a_stop_signal_is_carried_out_at_the_next_startup(home: Home, path: str) -> None:
    async with started(home) as (task, client):
        await home.ready.wait()
        await until(lambda: home.book.book)
        home.park.double.reload_delay_s = 10 if path == "/collective_rpc" else 0
        home.park.double.stuck_resets = 0 if path == "/collective_rpc" else 1000
        seen = read_desired(home.store, NAME)
        assert seen is not None
        wish = change_desired(home.store, seen, target(2), seen.target)
        await until(lambda: path in home.park.double.calls)
        queued = asyncio.create_task(ask(client, stream=False))
        await asyncio.sleep(0.05)
        terminate()
        answer = await queued
        assert (answer.status, answer.words) in [(503, set()), (200, {"1"})]
        await end(task)
    assert (home.park.alive, len(home.park.engines)) == (0, 1)
    assert read_desired(home.store, NAME) == wish
    async with home.serving() as client:
        assert (await ask(client, stream=False)).words == {"2"}
        await until(lambda: _outcome(home, wish) is SwapOutcome.SUCCEEDED)
        await until(lambda: home.book.book[Alias.PRODUCTION] == target(2).version)


def _outcome(home: Home, wish: Desired) -> SwapOutcome | None:
    swap = find_swap(home.store, NAME, wish.generation)
    return swap.result.outcome if swap and swap.result else None


async def test_signal_stops_a_server_whose_engine_fails_to_restart(home: Home) -> None:
    async with started(home) as (task, client):
        await home.ready.wait()
        home.park.failing_starts = 1000
        home.park.engines[0].kill()
        async with asyncio.timeout(3):
            while (await _status(client))["engine"]["state"] != "failed":
                pass
        terminate()
        await end(task)
    assert home.park.alive == 0


async def test_stopped_server_leaves_no_tasks_running(home: Home) -> None:
    before = asyncio.all_tasks()
    async with started(home) as (task, _):
        await home.ready.wait()
        terminate()
        await end(task)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() <= before | {asyncio.current_task()}


async def test_failed_startup_is_reported_and_the_port_is_released(home: Home) -> None:
    (home.registry.folder(target(1).version) / "merged" / "config.json").write_text("{}")
    with server.claim(home.settings) as claim, pytest.raises(IntegrityError):
        await home.serve(claim, f"{NAME}@1")
    async with home.serving(f"{NAME}@2") as client:
        assert (await ask(client, stream=False)).words == {"2"}


async def test_version_named_at_startup_becomes_desired(home: Home) -> None:
    async with home.serving(f"{NAME}@1"):
        pass
    async with home.serving(f"{NAME}@3"):
        pass
    async with home.serving() as client:
        assert (await ask(client, stream=False)).words == {"3"}
    desired = read_desired(home.store, NAME)
    assert desired is not None and desired.previous == target(1)


def test_accepted_connections_have_tcp_nodelay_enabled(home: Home) -> None:
    with server.claim(home.settings) as claim, socket.create_connection(claim.listener.getsockname()):
        accepted, _ = claim.listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_engine_start_is_aborted_if_the_server_cannot_listen_for_connections(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise OSError("address already in use")

    monkeypatch.setattr(HttpServer, "serve", refuse)
    home.park.start_delay_s = 10
    with server.claim(home.settings) as claim, pytest.raises(OSError, match="already in use"):
        async with asyncio.timeout(3):
            await home.serve(claim, f"{NAME}@1")
    assert home.park.alive == 0


async def test_crash_of_a_shared_component_stops_the_server_but_not_the_engine(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: object) -> None:
        await home.ready.wait()
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("serving.server.assembly.watch_loop_lag", fail)
        with server.claim(home.settings) as claim, pytest.raises(ZeroDivisionError):
            await home.serve(claim, f"{NAME}@1")
    (left,) = home.park.left.values()
    async with home.serving() as client:
        assert home.park.double is left.double
        assert (await ask(client, stream=False)).words == {"1"}
    assert home.park.alive == 0


async def test_second_server_with_the_same_home_fails_immediately(home: Home) -> None:
    async with home.serving(f"{NAME}@1"):
        with pytest.raises(BusyError, match="in use by process"), server.claim(home.settings):
            pass
        assert len(home.park.engines) == 1


async def test_second_server_on_the_same_port_fails_immediately(home: Home, tmp_path: Path) -> None:
    """The second server fails even before the first server responds."""
    with server.claim(home.settings) as first:
        port = int(first.url.rpartition(":")[2])
        other = Settings.model_validate({"home": tmp_path / "other", "serve": {"port": port}})
        with pytest.raises(BusyError, match=f"port {port}"), server.claim(other):
            pass


def test_port_can_be_claimed_again_after_the_first_claim_ends(home: Home) -> None:
    with server.claim(home.settings) as first:
        port = int(first.url.rpartition(":")[2])
    again = Settings.model_validate({"home": home.settings.home, "serve": {"port": port}})
    with server.claim(again) as second:
        assert second.url == first.url


def test_listen_address_that_is_not_local_is_rejected(home: Home) -> None:
    settings = Settings.model_validate({"home": home.settings.home, "serve": {"host": "192.0.2.1", "port": 0}})
    with pytest.raises(SettingsError, match=r"192\.0\.2\.1"), server.claim(settings):
        pass


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_ipv6_address_is_bracketed_in_the_url(home: Home) -> None:
    settings = Settings.model_validate({"home": home.settings.home, "serve": {"host": "::1", "port": 0}})
    try:
        with server.claim(settings) as claim:
            assert httpx.URL(claim.url).host == "::1"
    except SettingsError:
        pytest.skip("no IPv6 here")


async def test_error_is_shown_if_the_engine_cannot_start(home: Home) -> None:
    home.park.failing_starts = 1
    with server.claim(home.settings) as claim, pytest.raises(EngineError, match="no memory"):
        await home.serve(claim, f"{NAME}@1")
