"""The event loop's lag is what a task truly waits for."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from serving.telemetry.loop_lag import watch_loop_lag
from tests.serving.control import until


@pytest.fixture
async def lags() -> AsyncIterator[list[float]]:
    """What was observed, each millisecond."""
    observed = list[float]()
    watching = asyncio.create_task(watch_loop_lag(observed.append, every_s=0.001))
    yield observed
    watching.cancel()
    await asyncio.wait({watching})


async def test_a_loop_that_is_held_up_is_late_by_as_much(lags: list[float]) -> None:
    await until(lambda: lags)
    lags.clear()
    time.sleep(0.2)  # as a blocking call would
    await until(lambda: lags)
    assert lags[0] > 0.15


async def test_every_waking_is_observed_and_none_is_early(lags: list[float]) -> None:
    await until(lambda: len(lags) > 20)
    assert min(lags) >= 0
