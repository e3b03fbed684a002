"""Tests that checks run repeatedly in a separate process, even after failures."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from monitoring.drift.worker import checking_drift
from svc.settings.monitoring import MonitorSettings
from svc.settings.settings import Settings

PATIENCE_S = 30.0


def note(settings: Settings) -> Callable[[], None]:
    """Return a check that records its process id and fails every second time."""
    count = 0

    def check() -> None:
        nonlocal count
        count += 1
        with (settings.home / "checks").open("a") as file:
            file.write(f"{os.getpid()}\n")
        if count % 2:
            raise ValueError("this check fails")

    return check


def die(settings: Settings) -> Callable[[], None]:
    """Return a check that ends its own process."""

    def check() -> None:
        with (settings.home / "checks").open("a") as file:
            file.write(f"{os.getpid()}\n")
        os._exit(3)

    return check


def noted(home: Path, count: int) -> list[int]:
    """Return the process ids of the first checks."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        lines = (home / "checks").read_text().split() if (home / "checks").exists() else []
        if len(lines) >= count:
            return [int(line) for line in lines]
        time.sleep(0.05)
    raise AssertionError(f"no {count} checks in {PATIENCE_S} s")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monitoring.drift.worker._PAUSE_S", 0.0)


def settings(home: Path) -> Settings:
    return Settings(home=home, monitor=MonitorSettings(drift_every_s=0.01))


@pytest.mark.slow
def test_drift_checks_continue_in_the_same_process_after_one_fails(tmp_path: Path) -> None:
    with checking_drift(settings(tmp_path), note):
        processes = noted(tmp_path, 2)
    assert os.getpid() not in processes
    assert len(set(processes)) == 1


@pytest.mark.slow
def test_drift_process_is_restarted_when_it_dies(tmp_path: Path) -> None:
    with checking_drift(settings(tmp_path), die):
        assert len(set(noted(tmp_path, 2))) == 2


@pytest.mark.slow
def test_drift_process_has_low_priority_and_stops_with_its_worker(tmp_path: Path) -> None:
    with checking_drift(settings(tmp_path), note):
        (process, *_) = noted(tmp_path, 1)
        assert psutil.Process(process).nice() == 10
    assert not psutil.pid_exists(process)
