"""Tests that a gateway's usage includes all its processes, and that none of them outlives the benchmark."""

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.gateway.processes import cpu_seconds, resident_bytes, running

pytestmark = pytest.mark.slow

BUSY = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
SLEEP = "import time; print(1, flush=True); time.sleep(60)"
"""Program that prints a line when it begins to sleep."""
HOLD = "held = b'x' * 50_000_000\n"
CHILD = """import subprocess, sys, time
def begin(code):
    return subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
"""


def python(code: str) -> list[str]:
    """Return the command for a Python process that prints `ready`."""
    return [sys.executable, "-S", "-c", f"{code}print('ready', flush=True)\ntime.sleep(60)"]


def wait_until_ready(log: Path) -> None:
    deadline = time.monotonic() + 20
    while "ready" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    "code",
    [
        BUSY,
        f"{CHILD}begin({BUSY!r}).wait()\n",
        f"{CHILD}begin({BUSY + SLEEP!r}).stdout.readline()\n",
    ],
    ids=["its own", "of a child that has ended", "of a child that runs"],
)
def test_measured_cpu_time_includes_all_processes(tmp_path: Path, code: str) -> None:
    log = tmp_path / "log"
    with running(python(code), log=log) as process:
        wait_until_ready(log)
        assert 0.3 <= cpu_seconds(process.pid) < 1.0


def test_measured_memory_includes_child_processes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = f"{CHILD}begin({HOLD + SLEEP!r}).stdout.readline()\n"
    with running(python(code), log=log) as process:
        wait_until_ready(log)
        assert resident_bytes(process.pid) > 50_000_000 > psutil.Process(process.pid).memory_info().rss


def test_no_process_outlives_its_context_manager(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = f"{CHILD}child = begin({SLEEP!r})\n"
    with running(python(code), log=log) as process:
        wait_until_ready(log)
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
    assert len(tree) == 2
    assert not any(each.is_running() for each in tree)


def test_process_runs_on_its_assigned_core(tmp_path: Path) -> None:
    log, core = tmp_path / "log", max(os.sched_getaffinity(0))
    with running(python("import time\n"), core=core, log=log) as process:
        wait_until_ready(log)
        assert psutil.Process(process.pid).cpu_affinity() == [core]
