"""Tests that a measurement on a busy machine is repeated, and that the quietest measurement counts."""

import asyncio
import time
from collections.abc import Sequence

import psutil
import pytest

from svc.evaluation.quiet_machine import machine_s, measure_quietly

CORES = psutil.cpu_count() or 1


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svc.evaluation.quiet_machine._PAUSE_S", 0.0)


async def measured(shares: Sequence[float]) -> tuple[int, float, int]:
    """Return the result, its share of CPU use by others, and the number of measurements, given these shares."""
    used_s, made = 0.0, 0

    async def measure() -> int:
        nonlocal used_s, made
        began, own = time.monotonic(), time.process_time()
        await asyncio.sleep(0.02)
        used_s += shares[made] * (time.monotonic() - began) * CORES + time.process_time() - own
        made += 1
        return made

    result, share = await measure_quietly(measure, lambda: 0.0, used_s=lambda: used_s)
    return result, share, made


async def test_measurement_on_a_quiet_machine_is_not_repeated() -> None:
    result, share, made = await measured([0.02])
    assert (result, made) == (1, 1)
    assert share == pytest.approx(0.02, abs=0.03)


async def test_measurement_is_repeated_until_the_machine_is_quiet() -> None:
    result, _, made = await measured([0.9, 0.01])
    assert (result, made) == (2, 2)


async def test_quietest_of_three_measurements_is_used_on_a_busy_machine() -> None:
    result, share, made = await measured([0.9, 0.4, 0.8])
    assert (result, made) == (2, 3)
    assert share == pytest.approx(0.4, abs=0.05)


async def test_own_cpu_time_is_not_attributed_to_other_processes() -> None:
    async def measure() -> None:
        end = time.thread_time() + 0.2
        while time.thread_time() < end:
            pass

    before = machine_s()
    await measure_quietly(measure, lambda: 0.0, used_s=lambda: before + time.process_time())
    _, share = await measure_quietly(measure, lambda: 0.0, used_s=lambda: before + time.process_time())
    assert share < 0.02


def test_machine_cpu_time_increases_while_a_process_is_working() -> None:
    before, end = machine_s(), time.thread_time() + 0.3
    while time.thread_time() < end:
        pass
    assert machine_s() - before > 0.2
