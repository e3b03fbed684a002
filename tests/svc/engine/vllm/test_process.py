"""Tests that an engine process is ready when it responds, reports why if not, and is never left behind."""

import asyncio
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import psutil
import pytest

from svc.engine import orphans
from svc.engine.client import Health
from svc.engine.state import EnginePhase
from svc.engine.vllm import process as process_module
from svc.engine.vllm.launch import EngineSpec
from svc.engine.vllm.process import EngineProcess
from svc.errors import EngineError
from svc.settings.engine import Device, EngineSettings
from tests.event_loop import blocked_default_executor, watched_loop
from tests.svc.engine.devices import AVX512

pytestmark = pytest.mark.slow

SERVER = Path(__file__).parents[1] / "fake_server.py"
PARENT = """
import asyncio, sys
from pathlib import Path
from svc.engine.vllm import process
from svc.engine.vllm.launch import EngineSpec
from svc.settings.engine import EngineSettings
from tests.svc.engine.devices import AVX512

folder, server = Path(sys.argv[1]), sys.argv[2]
process.command = lambda spec: [sys.executable, server, "family", str(spec.socket)]
spec = EngineSpec(folder, "tuned", folder, folder, folder / "engine.log", folder, AVX512, EngineSettings(device="cpu"))

async def main():
    engine = process.EngineProcess(spec)
    await engine.start()
    print(engine._child.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""
Start = Callable[..., EngineProcess]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a folder with a path short enough for a socket."""
    with TemporaryDirectory(prefix="svc") as name:
        yield Path(name)


@pytest.fixture
async def engine_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    """Yield a function that creates an engine in a mode of the fake server. All engines are stopped at the end."""
    made: list[EngineProcess] = []
    monkeypatch.setattr(process_module, "_POLL_S", 0.02)

    def make(mode: str, **settings: Any) -> EngineProcess:
        command = [sys.executable, str(SERVER), mode]
        monkeypatch.setattr(process_module, "command", lambda spec: [*command, str(spec.socket)])
        spec = EngineSpec(
            model=folder / "model",
            served_name="tuned",
            runtime=folder,
            state=folder,
            log=folder / "logs" / "engine.log",
            cache=folder,
            capabilities=AVX512,
            settings=EngineSettings(device=Device.CPU, **settings),
        )
        made.append(EngineProcess(spec))
        return made[-1]

    yield make
    for engine in made:
        await engine.stop()


def pid_of(engine: EngineProcess) -> int:
    assert engine._child is not None
    return engine._child.pid


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def child_of(engine: EngineProcess) -> int:
    found = re.search(r"child (\d+)", engine.spec.log.read_text())
    assert found
    return int(found[1])


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Prevent this process from opening files while the context is active."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    opened = []
    try:
        with suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_engine_start_returns_once_the_engine_is_healthy(engine_in: Start) -> None:
    engine = engine_in("ready")
    await engine.start()
    assert await engine.client.healthy()


async def test_cpu_engine_has_lower_priority_than_the_server(engine_in: Start) -> None:
    engine = engine_in("ready")
    await engine.start()
    assert psutil.Process(pid_of(engine)).nice() > psutil.Process().nice()


async def test_engine_startup_progress_is_reported(engine_in: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[EnginePhase] = []
    engine = engine_in("hang", start_timeout_s=2)  # a busy machine starts Python slowly
    with pytest.raises(EngineError):
        await engine.start(heard.append)
    assert heard == [EnginePhase.PYTHON, EnginePhase.ARGUMENTS]


async def test_stopping_an_engine_also_removes_its_socket(engine_in: Start) -> None:
    engine = engine_in("ready")
    await engine.start()
    await engine.stop()
    assert not lives(pid_of(engine))
    assert not engine.spec.socket.exists()
    assert await engine.wait() == -signal.SIGTERM


async def test_stopping_an_engine_also_removes_sockets_left_by_a_killed_predecessor(
    engine_in: Start, folder: Path
) -> None:
    def bind(name: str) -> None:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(folder / name))

    bind("of-one-before")
    engine = engine_in("family")
    await engine.start()
    assert [path.name for path in folder.iterdir() if path.is_socket()] == [engine.spec.socket.name]
    bind("its-own")
    await engine.stop()
    assert not [path for path in folder.iterdir() if path.is_socket()]


async def test_stopping_an_engine_ends_its_child_processes(engine_in: Start) -> None:
    engine = engine_in("family")
    await engine.start()
    child = child_of(engine)
    assert lives(child)
    await engine.stop()
    assert not lives(child)


async def test_children_of_a_dead_engine_are_stopped(engine_in: Start) -> None:
    engine = engine_in("family")
    await engine.start()
    psutil.Process(pid_of(engine)).kill()
    await engine.wait()
    await engine.stop()
    assert not lives(child_of(engine))


async def test_engine_ignoring_sigterm_is_killed(engine_in: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphans, "STOP_GRACE_S", 0.2)
    engine = engine_in("stubborn")
    await engine.start()
    await engine.stop()
    assert await engine.wait() == -signal.SIGKILL


async def test_engine_can_be_stopped_while_the_default_executor_is_blocked(engine_in: Start) -> None:
    engine = engine_in("ready")
    await engine.start()
    pid = pid_of(engine)
    with blocked_default_executor():
        async with asyncio.timeout(10):
            await engine.stop()
    assert not lives(pid)


async def test_stopping_an_engine_twice_is_not_an_error(engine_in: Start) -> None:
    engine = engine_in("ready")
    await engine.start()
    await engine.stop()
    await engine.stop()


async def test_never_started_engine_can_be_stopped(engine_in: Start) -> None:
    engine = engine_in("ready")
    await engine.stop()
    assert await engine.wait() == 0


async def test_engine_death_is_detected(engine_in: Start) -> None:
    engine = engine_in("ready")
    await engine.start()
    psutil.Process(pid_of(engine)).kill()
    assert await asyncio.wait_for(engine.wait(), 5) == -signal.SIGKILL
    assert not await engine.client.healthy()


async def test_engine_health_is_reported_correctly_when_no_file_descriptors_are_free(
    engine_in: Start,
) -> None:
    engine = engine_in("ready")
    await engine.start()
    ended = asyncio.create_task(engine.wait())
    with no_descriptors_left():
        assert await engine.client.health() is Health.UNKNOWN
        await asyncio.sleep(0.1)
        assert not ended.done()
        os.kill(pid_of(engine), signal.SIGKILL)
        assert await asyncio.wait_for(ended, 5) == -signal.SIGKILL


async def test_log_of_the_previous_engine_is_kept(engine_in: Start, folder: Path) -> None:
    with pytest.raises(EngineError):
        await engine_in("crash").start()
    await engine_in("ready").start()
    assert "bad weights" in (folder / "logs" / "engine.log.1").read_text()
    assert "bad weights" not in (folder / "logs" / "engine.log").read_text()


async def test_error_for_an_engine_that_exits_at_startup_includes_its_last_error_and_log(engine_in: Start) -> None:
    engine = engine_in("crash")
    with pytest.raises(EngineError, match="exited with code 3 before it was ready: ValueError: bad weights") as caught:
        await engine.start()
    assert str(engine.spec.log) in caught.value.todo


async def test_engine_exceeding_the_start_timeout_is_stopped(engine_in: Start) -> None:
    engine = engine_in("hang", start_timeout_s=0.3)
    with pytest.raises(EngineError, match="not ready after 0 s") as caught:
        await engine.start()
    assert "engine.start_timeout_s" in caught.value.todo
    assert not lives(pid_of(engine))


async def test_cancelled_engine_start_leaves_no_process_running(engine_in: Start) -> None:
    engine = engine_in("hang")
    start = asyncio.create_task(engine.start())
    while engine._child is None:
        await asyncio.sleep(0.01)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not lives(pid_of(engine))


async def test_engine_start_cancelled_during_process_creation_leaves_no_process_running(
    engine_in: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()

    @contextmanager
    def slowly_locked(folder: Path) -> Iterator[IO[str]]:
        begun.set()
        time.sleep(0.2)
        with orphans.locked(folder) as file:
            yield file

    monkeypatch.setattr(process_module, "locked", slowly_locked)
    engine = engine_in("hang")
    start = asyncio.create_task(engine.start())
    await asyncio.to_thread(begun.wait)
    for _ in range(3):  # like a server that gets repeated signals
        start.cancel()
        await asyncio.sleep(0.01)
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not lives(pid_of(engine))


async def whole_life(engine_in: Start) -> None:
    """Start, detach, adopt and stop an engine, and start one that fails."""
    engine, later = engine_in("ready"), engine_in("ready")
    await engine.start()
    await engine.record("one")
    await engine.leave()
    assert await later.orphan_holds() == "one"
    await later.adopt()
    await later.stop()
    with pytest.raises(EngineError):
        await engine_in("crash").start()


async def test_engine_start_and_stop_make_no_blocking_calls_in_the_event_loop(engine_in: Start) -> None:
    with watched_loop() as watch:
        await whole_life(engine_in)
    assert watch.waits == []


async def test_engine_start_and_stop_run_no_long_computations_in_the_event_loop(engine_in: Start) -> None:
    await whole_life(engine_in)  # modules that are imported at first use are loaded
    with watched_loop() as watch:
        await whole_life(engine_in)
    assert watch.slow == []


async def test_engine_of_a_killed_parent_is_stopped_at_the_next_engine_start(engine_in: Start, folder: Path) -> None:
    arguments = [sys.executable, "-c", PARENT, str(folder), str(SERVER)]
    parent = await asyncio.create_subprocess_exec(*arguments, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    orphan = int(await parent.stdout.readline())
    parent.kill()
    await parent.wait()
    assert lives(orphan)
    try:
        engine = engine_in("ready")
        await engine.start()
        assert not lives(orphan)
        assert await engine.client.healthy()
    finally:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(orphan).kill()


async def test_unrelated_process_reusing_the_pid_of_an_engine_is_not_stopped(engine_in: Start, folder: Path) -> None:
    stranger = await asyncio.create_subprocess_exec(sys.executable, "-c", "import time; time.sleep(60)")
    (folder / "engine.json").write_text(json.dumps({"pid": stranger.pid, "created": 1.0}))
    try:
        await engine_in("ready").start()
        assert lives(stranger.pid)
    finally:
        stranger.kill()
        await stranger.wait()


@pytest.mark.parametrize("record", ["", "{", "[]", "{}", '{"pid": "x", "created": 1}', '{"pid": -5, "created": 1}'])
async def test_corrupt_engine_record_does_not_prevent_engine_startup(
    engine_in: Start, folder: Path, record: str
) -> None:
    (folder / "engine.json").write_text(record)
    engine = engine_in("ready")
    await engine.start()
    assert await engine.client.healthy()


async def test_engine_is_not_put_to_sleep_if_main_memory_cannot_hold_its_weights(
    engine_in: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, engine = list[str](), engine_in("ready")

    async def sleep() -> None:
        asked.append("sleep")

    monkeypatch.setattr(engine.client, "sleep", sleep)
    monkeypatch.setattr(process_module, "backup_shortage", lambda spec: "2 GiB are needed, 1 GiB is free")
    with pytest.raises(EngineError, match="cannot be put to sleep: 2 GiB are needed"):
        await engine.sleep()
    assert asked == []


async def test_memory_is_checked_only_before_an_engine_sleeps_for_the_first_time(
    engine_in: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, engine, answers = list[str](), engine_in("ready"), iter([None, "full"])

    async def sleep() -> None:
        asked.append("sleep")

    monkeypatch.setattr(engine.client, "sleep", sleep)
    monkeypatch.setattr(process_module, "backup_shortage", lambda spec: next(answers))
    await engine.sleep()
    await engine.sleep()
    assert asked == ["sleep", "sleep"]
