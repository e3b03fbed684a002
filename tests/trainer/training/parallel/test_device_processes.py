"""Tests that the processes of several devices end together, with one error that names the cause."""

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from svc.errors import InterruptedRunError, TrainingError
from trainer.training.parallel.device_processes import run_on_devices
from trainer.training.parallel.devices import TrainingDevice
from trainer.training.parallel.processes import Call, Listens, Place

pytestmark = pytest.mark.slow

DEVICES = (TrainingDevice("GPU 0 (A100)"), TrainingDevice("GPU 1 (A100)"))
ENDS_S = 5.0
"""Seconds within which all processes must have ended after one died, on a busy machine."""


def run(work: Callable[..., Any], *arguments: Any, **functions: Callable[..., object]) -> list[Any]:
    return run_on_devices(DEVICES, work, arguments, functions)


def describe(place: Place, text: str) -> tuple[str, int, int, str | None]:
    return text, place.rank, place.size, os.environ.get("LOCAL_RANK")


def call_twice(place: Place) -> int:
    if place.rank == 0:
        for number in (1, 2):
            place.pipe.send(Call("add", (number,)))
            assert place.pipe.recv() is None
    return os.getpid()


def fail_in_second(place: Place, error: Exception) -> None:
    if place.rank == 1:
        raise error
    time.sleep(60)


def fail_in_both(place: Place) -> None:
    raise TrainingError("the loss exploded")


def die_in_second(place: Place, started: Path) -> None:
    (started / str(os.getpid())).touch()
    if place.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def fail_after_second_died(place: Place) -> None:
    """Fail at once in the first process, as a broken connection makes it, and then die in the second."""
    if place.rank == 0:
        raise RuntimeError("connection closed by peer")
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(place: Place, started: Path) -> None:
    (started / str(os.getpid())).touch()
    time.sleep(60)


def stop_when_told(place: Place, started: Path) -> None:
    """Stop in both processes when the first one receives a signal, and need a moment to exit."""
    told = started / "told"
    if place.rank == 0:
        place.pipe.send(Listens())
        (started / str(os.getpid())).touch()
        told.write_text(place.pipe.recv().name)
    else:
        (started / str(os.getpid())).touch()
        while not (told.exists() and told.read_text()):
            time.sleep(0.05)
    atexit.register(slow_exit, started / f"exited-{place.rank}")
    raise InterruptedRunError(f"stopped by {told.read_text()} after step 3")


def slow_exit(exited: Path) -> None:
    time.sleep(0.5)
    exited.touch()


def finish_when_told(place: Place, started: Path) -> None:
    (started / str(os.getpid())).touch()
    if place.rank == 0:
        place.pipe.send(Listens())
        place.pipe.recv()


def interrupt_when_started(folder: Path, by: signal.Signals = signal.SIGTERM) -> threading.Thread:
    """Send a signal to this process as soon as two processes have started."""

    def watch() -> None:
        while len(list(folder.iterdir())) < 2:
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), by)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def alive(folder: Path) -> list[str]:
    """Return the processes that have reported their start and still run."""
    return [path.name for path in folder.iterdir() if psutil.pid_exists(int(path.name))]


def test_results_are_returned_in_the_order_of_the_devices() -> None:
    assert run(describe, "a") == [("a", 0, 2, "0"), ("a", 1, 2, "1")]
    assert "LOCAL_RANK" not in os.environ


def test_rank_environment_variable_is_not_set_for_a_single_process() -> None:
    assert run_on_devices(DEVICES[:1], describe, ("a",), {}) == [("a", 0, 1, None)]


def test_parent_process_executes_callbacks_of_the_first_process_in_order() -> None:
    numbers: list[int] = []
    processes = run(call_twice, add=numbers.append)
    assert numbers == [1, 2]
    assert os.getpid() not in processes


def test_error_names_rank_and_device_when_one_process_fails() -> None:
    with pytest.raises(TrainingError, match=r"^rank 1 of 2 on GPU 1 \(A100\): no memory"):
        run(fail_in_second, TrainingError("no memory"))


def test_library_exception_is_reported_with_the_rank_and_device_that_raised_it() -> None:
    with pytest.raises(RuntimeError, match=r"^rank 1 of 2 on GPU 1 \(A100\): ValueError: wrong") as caught:
        run(fail_in_second, ValueError("wrong"))
    assert "in fail_in_second" in caught.value.__notes__[0]


def test_error_names_no_rank_when_all_processes_fail_with_the_same_error() -> None:
    with pytest.raises(TrainingError, match=r"^the loss exploded"):
        run(fail_in_both)


def test_all_processes_exit_within_seconds_when_one_process_is_killed(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"rank 1 of 2 on GPU 1 \(A100\) was killed by SIGKILL") as caught:
        run(die_in_second, tmp_path)
    assert "free some memory" in caught.value.todo
    killed = (tmp_path / max(path.name for path in tmp_path.iterdir())).stat().st_mtime
    assert time.time() - killed < ENDS_S
    assert alive(tmp_path) == []


def test_error_reports_the_killed_process_rather_than_the_process_that_failed_as_a_result() -> None:
    with pytest.raises(TrainingError, match=r"rank 1 of 2 .* was killed by SIGKILL"):
        run(fail_after_second_died)


def test_signal_before_the_first_step_stops_all_training_processes(tmp_path: Path) -> None:
    thread = interrupt_when_started(tmp_path)
    with pytest.raises(InterruptedRunError, match="stopped by SIGTERM before the first step"):
        run(sleep, tmp_path)
    thread.join()
    assert alive(tmp_path) == []


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_all_processes_stop_and_clean_up_when_a_signal_arrives(tmp_path: Path, by: signal.Signals) -> None:
    thread = interrupt_when_started(tmp_path, by)
    with pytest.raises(InterruptedRunError, match=f"^stopped by {by.name} after step 3"):
        run(stop_when_told, tmp_path)
    thread.join()
    assert len(list(tmp_path.glob("exited-*"))) == 2


def test_run_is_interrupted_when_a_signal_arrives_after_the_last_step(tmp_path: Path) -> None:
    thread = interrupt_when_started(tmp_path)
    with pytest.raises(InterruptedRunError, match="stopped by SIGTERM after training all steps"):
        run(finish_when_told, tmp_path)
    thread.join()


def test_training_processes_exit_when_the_parent_process_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from tests.trainer.training.parallel.test_device_processes import run, sleep\n"
        "if __name__ == '__main__':\n    run(sleep, Path(sys.argv[1]))\n"
    )
    (tmp_path / "script.py").write_text(script)
    started = tmp_path / "started"
    started.mkdir()
    with subprocess.Popen([sys.executable, tmp_path / "script.py", started], stderr=subprocess.DEVNULL) as caller:
        while len(list(started.iterdir())) < 2:
            assert caller.poll() is None
            time.sleep(0.05)
        caller.kill()
    deadline = time.monotonic() + ENDS_S
    while alive(started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(started) == []
