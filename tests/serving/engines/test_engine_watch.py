"""Tests that a silent engine is dead only if it uses no CPU, or uses CPU for too long without responding."""

import asyncio
from collections.abc import Awaitable
from types import SimpleNamespace
from typing import cast

import pytest

from serving.engines.engine_watch import EngineWatch
from svc.engine.client import Health
from svc.engine.engine import LastingEngine

LIVES_S, PATIENCE_S = 0.6, 0.1


class SilentEngine:
    """An engine that does not respond to health checks.

    Attributes:
        share: share of a CPU core that its API server uses.
    """

    def __init__(self, share: float | None) -> None:
        self.share = share
        self.client = SimpleNamespace(health=self._health)
        self._began = asyncio.get_running_loop().time()

    def front_s(self) -> float | None:
        """Return the CPU time of the API server, in seconds."""
        return None if self.share is None else self.share * (asyncio.get_running_loop().time() - self._began)

    async def wait(self) -> int | None:
        """Never return, because the engine does not exit."""
        await asyncio.Event().wait()
        return None

    async def _health(self) -> Health:
        return Health.BAD


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.engines.engine_watch._HEALTH_S", 0.02)
    monkeypatch.setattr("serving.engines.engine_watch._UNHEALTHY_S", PATIENCE_S)
    monkeypatch.setattr("serving.engines.engine_watch._BUSY_S", LIVES_S)


async def seconds_until_death(share: float | None) -> float:
    engine = SilentEngine(share)
    watch = EngineWatch(lambda: cast(LastingEngine, engine))
    began = asyncio.get_running_loop().time()
    async with asyncio.timeout(5):
        assert "it has not answered health checks" in await cast(Awaitable[str], watch.died())
    return asyncio.get_running_loop().time() - began


@pytest.mark.parametrize("share", [0.0, 0.01, None])
async def test_engine_is_quickly_declared_dead_if_it_neither_responds_nor_uses_cpu(share: float | None) -> None:
    assert PATIENCE_S <= await seconds_until_death(share) < LIVES_S


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.2, 1.0])
async def test_unresponsive_engine_that_uses_cpu_is_declared_dead_much_later(share: float) -> None:
    assert await seconds_until_death(share) >= LIVES_S
