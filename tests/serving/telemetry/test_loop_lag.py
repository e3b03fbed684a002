"""Tests that the measured event loop lag equals the real delay of a task."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from serving.telemetry.loop_lag import watch_loop_lag
from tests.serving.control import until


@pytest.fixture
async def lags() -> AsyncIterator[list[float]]:
    """Yield the lags observed so far."""
    observed = list[float]()
    watching = asyncio.create_task(watch_loop_lag(observed.append, every_s=0.001))
    yield observed
    watching.cancel()
    await asyncio.wait({watching})


@pytest.mark.slow
async def test_event_loop_lag_equals_the_time_the_loop_is_blocked(lags: list[float]) -> None:
    await until(lambda: lags)
    lags.clear()
    time.sleep(0.2)  # like a blocking call
    await until(lambda: lags)
    assert lags[0] > 0.15


async def test_event_loop_lag_is_measured_repeatedly_and_is_never_negative(lags: list[float]) -> None:
    await until(lambda: len(lags) > 20)
    assert min(lags) >= 0
