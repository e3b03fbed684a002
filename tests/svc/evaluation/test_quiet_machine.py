"""Tests that a measurement on a busy machine is repeated, and that the quietest measurement counts."""

import asyncio
import os
import time
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from svc.evaluation.quiet_machine import machine_s, measure_quietly


class CpuTimes(NamedTuple):
    """CPU times in the form in which psutil returns them."""

    user: float
    system: float
    idle: float
    iowait: float


CORES = len(os.sched_getaffinity(0))


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


@pytest.mark.slow
async def test_cpu_time_of_the_measurement_itself_is_not_attributed_to_other_processes() -> None:
    async def measure() -> None:
        end = time.thread_time() + 0.2
        while time.thread_time() < end:
            pass

    before = machine_s()
    await measure_quietly(measure, lambda: 0.0, used_s=lambda: before + time.process_time())
    _, share = await measure_quietly(measure, lambda: 0.0, used_s=lambda: before + time.process_time())
    assert share < 0.02


@pytest.mark.slow
def test_machine_cpu_time_increases_while_a_process_is_working() -> None:
    before, end = machine_s(), time.thread_time() + 0.3
    while time.thread_time() < end:
        pass
    assert machine_s() - before > 0.2


@pytest.mark.parametrize(("cpus", "expected_s"), [({0}, 1.5), ({1}, 40.0), ({0, 1}, 41.5), ({6, 7}, 41.5)])
def test_cpu_time_is_counted_for_the_cpus_of_this_process_if_known_and_otherwise_for_all_cpus(
    cpus: set[int], expected_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container may have its own numbers for its CPUs, so that those of this process are not among them."""
    usage = [
        CpuTimes(user=1.0, system=0.5, idle=7.0, iowait=2.0),
        CpuTimes(user=30.0, system=10.0, idle=7.0, iowait=2.0),
    ]
    monkeypatch.setattr("svc.evaluation.quiet_machine.psutil.cpu_times", lambda *, percpu: usage)
    monkeypatch.setattr("svc.evaluation.quiet_machine.os.sched_getaffinity", lambda _: cpus)
    assert machine_s() == expected_s
