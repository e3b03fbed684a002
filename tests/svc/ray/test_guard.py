"""Tests that an engine does not outlive its actor, with real processes."""

import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from svc.engine.orphans import runs

SERVER = Path(__file__).parents[1] / "engine" / "fake_server.py"
ACTOR = """
import asyncio, os, psutil, sys
from pathlib import Path
from svc.engine.vllm import process
from svc.engine.vllm.launch import EngineSpec
from svc.ray.guard import Guard
from svc.settings.engine import EngineSettings
from tests.svc.engine.devices import AVX512

folder, server = Path(sys.argv[1]), sys.argv[2]
process.command = lambda spec: [sys.executable, server, "family", str(spec.socket)]
spec = EngineSpec(folder, "tuned", folder, folder, folder / "engine.log", folder, AVX512, EngineSettings(device="cpu"))

async def main():
    engine, guard = process.EngineProcess(spec), Guard(folder)
    await engine.start()
    print(engine._child.pid, flush=True)
    if (line := sys.stdin.readline()) == "stop\\n":
        await engine.stop()
        guard.dismiss()
    elif line:  # as an actor of Ray whose node is lost
        for child in psutil.Process().children():
            child.kill()
        os._exit(1)

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "stop", "lose the node"])
def test_ray_engine_and_its_child_processes_stop_when_the_ray_actor_stops(end: str) -> None:
    with TemporaryDirectory(prefix="svc") as folder:
        pipe = subprocess.PIPE
        with subprocess.Popen([sys.executable, "-c", ACTOR, folder, SERVER], stdin=pipe, stdout=pipe) as actor:
            assert actor.stdin and actor.stdout
            engine = psutil.Process(int(actor.stdout.readline()))
            family = [engine, *engine.children()]
            assert len(family) == 2
            if end == "killed":
                actor.kill()
            else:
                actor.stdin.write(f"{end}\n".encode())
                actor.stdin.flush()
        deadline = time.monotonic() + 15
        while any(runs(process) for process in family):
            assert time.monotonic() < deadline
            time.sleep(0.05)
