"""Tests that an engine outlives its server, and that the next server adopts it or stops it completely."""

import asyncio
import fcntl
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from svc.engine.orphans import LOCK_FILE, RECORD_FILE, end_engine, find_engine, locked, read_record, runs, write_record
from svc.engine.vllm import process as process_module
from svc.engine.vllm.launch import EngineSpec
from svc.engine.vllm.process import EngineProcess
from svc.errors import EngineError
from svc.settings.engine import Device, EngineSettings
from tests.svc.engine.devices import AVX512

pytestmark = pytest.mark.slow

SERVER = Path(__file__).with_name("fake_server.py")
PARENT = """
import asyncio, sys
from pathlib import Path
from svc.engine.vllm import process
from svc.engine.vllm.launch import EngineSpec
from svc.settings.engine import EngineSettings
from tests.svc.engine.devices import AVX512

folder, server, mode, fail = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
process.command = lambda spec: [sys.executable, server, mode, str(spec.socket)]
if fail == "no-record":
    process.write_record = lambda folder, record: None
settings = EngineSettings(device="cpu")
spec = EngineSpec(folder / "one", "tuned", folder, folder, folder / "engine.log", folder, AVX512, settings)

async def main():
    engine = process.EngineProcess(spec)
    await engine.start()
    await engine.record("one")
    print(engine._child.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a folder with a path short enough for a socket."""
    with TemporaryDirectory(prefix="svc") as name:
        yield Path(name)


def engine_in(folder: Path, model: str = "two", **settings: object) -> EngineProcess:
    chosen = EngineSettings.model_validate({"device": Device.CPU, **settings})
    log = folder / "engine.log"
    return EngineProcess(EngineSpec(folder / model, "tuned", folder, folder, log, folder, AVX512, chosen))


@asynccontextmanager
async def orphan(folder: Path, mode: str = "family", *, fail: str = "") -> AsyncIterator[psutil.Process]:
    """Run an engine that has a child process and whose server was killed."""
    arguments = [sys.executable, "-c", PARENT, str(folder), str(SERVER), mode, fail]
    parent = await asyncio.create_subprocess_exec(*arguments, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    engine = psutil.Process(int(await parent.stdout.readline()))
    parent.kill()
    await parent.wait()
    try:
        yield engine
    finally:
        with suppress(psutil.NoSuchProcess):
            engine.kill()
        with suppress(psutil.NoSuchProcess, LookupError):
            child(folder).kill()


def child(folder: Path) -> psutil.Process:
    found = re.search(r"child (\d+)", (folder / "engine.log").read_text())
    if not found:
        raise LookupError("it has none")
    return psutil.Process(int(found[1]))


async def test_orphaned_engine_keeps_running_and_reports_which_weights_it_has_loaded(folder: Path) -> None:
    async with orphan(folder) as engine:
        assert find_engine(folder) == engine
        assert await engine_in(folder).orphan_holds() == "one"


async def test_orphaned_engine_can_be_adopted_and_stopped(folder: Path) -> None:
    async with orphan(folder) as engine:
        adopting, core = engine_in(folder), child(folder)
        await adopting.adopt()
        assert await adopting.client.healthy()
        await adopting.stop()
        assert not runs(engine)
        assert not runs(core)
        assert await adopting.wait() is None


async def test_death_of_an_adopted_engine_is_detected(folder: Path) -> None:
    async with orphan(folder) as engine:
        adopting = engine_in(folder)
        await adopting.adopt()
        engine.kill()
        assert await asyncio.wait_for(adopting.wait(), 5) is None


async def test_engine_started_with_different_arguments_is_not_adopted(folder: Path) -> None:
    async with orphan(folder):
        assert await engine_in(folder, args=("--seed", "1")).orphan_holds() is None
        assert await engine_in(folder, start_timeout_s=7).orphan_holds() == "one"


async def test_dead_engine_reports_no_weights_and_cannot_be_adopted(folder: Path) -> None:
    async with orphan(folder) as engine:
        engine.kill()
        await asyncio.sleep(0.1)
        adopting = engine_in(folder)
        assert await adopting.orphan_holds() is None
        with pytest.raises(EngineError, match="is not responding"):
            await adopting.adopt()


async def test_engine_core_process_that_outlived_its_engine_is_stopped(folder: Path) -> None:
    async with orphan(folder) as engine:
        engine.kill()
        core = child(folder)
        assert runs(core)
        await asyncio.to_thread(end_engine, folder)
        assert not runs(core)


async def test_engine_without_a_record_is_found_by_its_lock_and_is_stopped(folder: Path) -> None:
    async with orphan(folder, fail="no-record") as engine:
        assert read_record(folder) is None
        await asyncio.to_thread(end_engine, folder)
        assert not runs(engine)


@pytest.mark.parametrize("fail", ["", "no-record"])
async def test_child_processes_started_during_engine_shutdown_are_stopped_too(folder: Path, fail: str) -> None:
    async with orphan(folder, "late", fail=fail) as engine:
        await asyncio.to_thread(end_engine, folder)
        assert not runs(engine)
        assert not runs(child(folder))


def test_engine_lock_is_acquired_after_a_short_lived_shared_lock_is_released(folder: Path) -> None:
    with (folder / LOCK_FILE).open("ab") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.2, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        with locked(folder):
            pass


def test_error_for_a_lock_held_by_another_engine_contains_the_pid_of_that_engine(folder: Path) -> None:
    sleeper = "import fcntl, sys, time; fcntl.flock(3, 2); print(flush=True); time.sleep(60)"
    arguments = ["bash", "-c", f"exec 3>>{folder / LOCK_FILE}; exec {sys.executable} -c '{sleeper}'"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        with pytest.raises(EngineError, match=str(other.pid)), locked(folder):
            pass
        other.kill()


async def test_process_reusing_a_dead_engines_pid_is_left_alone(folder: Path) -> None:
    async with orphan(folder) as engine:
        engine.kill()
        record = read_record(folder)
    assert record is not None
    arguments = [sys.executable, "-c", "import time; time.sleep(60)"]
    stranger = await asyncio.create_subprocess_exec(*arguments, process_group=0)
    try:
        write_record(folder, replace(record, pid=stranger.pid))
        assert read_record(folder) is not None, "the test tests nothing"
        assert find_engine(folder) is None
        await asyncio.to_thread(end_engine, folder)
        assert stranger.returncode is None
        assert runs(psutil.Process(stranger.pid))
    finally:
        stranger.kill()
        await stranger.wait()


async def test_copied_state_folder_cannot_be_used_to_stop_the_engine(folder: Path) -> None:
    async with orphan(folder) as engine:
        copy = folder / "copy"
        copy.mkdir()
        shutil.copy(folder / RECORD_FILE, copy)
        assert read_record(copy) is None
        await asyncio.to_thread(end_engine, copy)
        assert runs(engine)


async def test_detached_engine_keeps_running(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        process_module, "command", lambda spec: [sys.executable, str(SERVER), "ready", str(spec.socket)]
    )
    engine = engine_in(folder)
    await engine.start()
    await engine.record("two")
    await engine.leave()
    adopting = engine_in(folder, "three")
    try:
        assert await adopting.orphan_holds() == "two"
        await adopting.adopt()
        assert await adopting.client.healthy()
    finally:
        await adopting.stop()


async def test_adopted_engine_is_stopped_after_its_files_are_deleted(folder: Path) -> None:
    async with orphan(folder) as engine:
        adopting, core = engine_in(folder), child(folder)
        await adopting.adopt()
        (folder / LOCK_FILE).unlink()
        (folder / RECORD_FILE).unlink()
        await adopting.stop()
        assert not runs(engine)
        assert not runs(core)


async def test_new_engine_record_replaces_the_old_one(folder: Path) -> None:
    async with orphan(folder):
        adopting = engine_in(folder)
        await adopting.record(None)
        assert await adopting.orphan_holds() is None
        await adopting.record("three")
        assert await adopting.orphan_holds() == "three"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"pid": "x", "boot": "", "ticks": 1, "plan": [], "launch": ""}']
)
def test_corrupt_engine_record_is_ignored(folder: Path, text: str) -> None:
    (folder / RECORD_FILE).write_text(text)
    (folder / LOCK_FILE).touch()
    assert read_record(folder) is None
    assert find_engine(folder) is None
    end_engine(folder)


def test_no_engine_is_found_in_an_empty_folder(folder: Path) -> None:
    assert find_engine(folder) is None
    end_engine(folder)
