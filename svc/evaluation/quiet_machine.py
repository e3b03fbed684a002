"""Repeats a measurement if other processes keep the CPUs of this process busy, and reports how busy they were.

On a CPU, an engine measured during an unrelated training run decoded 4 tokens/s instead of 140. If `taskset` or a
container restricts this process to some CPUs, only those are checked, because load on other CPUs does not slow down the
measurement. Other processes on the same GPU go unnoticed.
"""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import psutil

log = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_OTHERS_SHARE = 0.1
"""Maximum share of CPU time that other processes may use during a measurement. An idle system with a progress bar stays
below this share, and a smaller share does not affect an engine's speed."""
_TRIES = 3
_PAUSE_S = 10.0


def machine_s() -> float:
    """Return the CPU time used by all processes on this process's CPUs or stolen by the host, in seconds."""
    usage, cpus = psutil.cpu_times(percpu=True), os.sched_getaffinity(0)
    if max(cpus) < len(usage):  # otherwise, a container has its own numbers for its CPUs
        usage = [usage[cpu] for cpu in cpus]
    return sum(
        sum(times[:]) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0) for times in usage
    )


async def measure_quietly(
    measure: Callable[[], Awaitable[Result]],
    own_s: Callable[[], float],
    *,
    used_s: Callable[[], float] = machine_s,
) -> tuple[Result, float]:
    """Take a measurement, and repeat it up to two times if other processes keep the machine busy.

    There is a pause of 10 seconds before each repetition.

    Args:
        own_s: function that returns the CPU time of the measured processes, in seconds. The CPU time of this process is
            added to it.
        used_s: function that returns the CPU time of all processes, in seconds.

    Returns:
        The least disturbed result, and the share of CPU time that other processes used during that measurement.
    """
    best: tuple[Result, float] | None = None
    for attempt in range(_TRIES):
        if attempt:
            share = 100 * (best or (None, 0.0))[1]
            log.warning("other processes used %.0f%% of the CPU time; repeating the measurement", share)
            await asyncio.sleep(_PAUSE_S)
        began, before = time.monotonic(), used_s() - own_s() - time.process_time()
        result = await measure()
        others_s = used_s() - own_s() - time.process_time() - before
        share = max(0.0, others_s) / ((time.monotonic() - began) * len(os.sched_getaffinity(0)))
        if best is None or share < best[1]:
            best = result, share
        if best[1] <= MAX_OTHERS_SHARE:
            break
    assert best is not None  # noqa: S101 - it was measured at least once
    return best
