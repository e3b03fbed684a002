"""Tests work in a separate process: its result, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from svc.child_process import in_child_process
from svc.errors import RecipeError, TrainingError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def describe(text: str, *, times: int) -> tuple[int, str]:
    return os.getpid(), text * times


def refuse() -> NoReturn:
    raise RecipeError("size 3", expected="4", todo="write 4")


def fail() -> NoReturn:
    raise ZeroDivisionError("by zero")


def die(by: signal.Signals) -> None:
    os.kill(os.getpid(), by)


def sleep_long(mark: Path) -> None:
    mark.write_text(str(os.getpid()), "utf-8")
    time.sleep(60)


LEAVES_LATE = """
import multiprocessing
import time
from multiprocessing.util import Finalize
from svc.child_process import in_child_process

locks = []

def lock():
    locks.append(multiprocessing.Lock())  # gone when the process ends, and later than what follows
    Finalize(None, time.sleep, (0.3,), exitpriority=1)
    return "done"

if __name__ == "__main__":
    print(in_child_process(lock))
"""


def test_child_process_has_time_to_clean_up_after_returning_its_result(tmp_path: Path) -> None:
    """A child that is killed immediately leaks semaphores, and Python warns about each when the caller exits."""
    script = tmp_path / "leaves_late.py"
    script.write_text(LEAVES_LATE, "utf-8")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_function_runs_in_a_child_process_and_returns_its_result() -> None:
    process, text = in_child_process(describe, "ab", times=2)
    assert process != os.getpid()
    assert text == "abab"


def test_service_error_keeps_its_fields_when_raised_in_a_child_process() -> None:
    with pytest.raises(RecipeError) as caught:
        in_child_process(refuse)
    assert (caught.value.wrong, caught.value.expected, caught.value.todo) == ("size 3", "4", "write 4")


def test_error_from_a_child_process_includes_the_original_traceback() -> None:
    with pytest.raises(ZeroDivisionError, match="by zero") as caught:
        in_child_process(fail)
    assert "in fail" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("by", "todo"), [(signal.SIGKILL, "free some memory"), (signal.SIGABRT, "check the process's output")]
)
def test_error_distinguishes_a_crashed_child_process_from_one_killed_by_the_system(
    by: signal.Signals, todo: str
) -> None:
    with pytest.raises(TrainingError, match=f"exited with code -{by.value}") as caught:
        in_child_process(die, by)
    assert todo in caught.value.todo


CALLER = """
import sys
from pathlib import Path
from tests.svc.test_child_process import sleep_long
from svc.child_process import in_child_process
try:
    in_child_process(sleep_long, Path(sys.argv[1]))
except KeyboardInterrupt:
    sys.exit(16)
"""


@pytest.mark.parametrize(("by", "exit_code"), [(signal.SIGINT, 16), (signal.SIGKILL, -signal.SIGKILL)])
def test_child_process_exits_when_its_parent_process_exits(tmp_path: Path, by: signal.Signals, exit_code: int) -> None:
    mark = tmp_path / "mark"
    caller = subprocess.Popen([sys.executable, "-c", CALLER, str(mark)])
    deadline = time.monotonic() + 30
    while not (mark.exists() and mark.read_text("utf-8")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child = psutil.Process(int(mark.read_text("utf-8")))
    caller.send_signal(by)
    assert caller.wait(10) == exit_code
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running()
