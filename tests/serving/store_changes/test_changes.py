"""Tests waiting for changes in the store, without a database."""

import asyncio

import pytest

from serving.store_changes import changes as changes_module
from serving.store_changes.changes import Changes

LONG_S, SHORT_S = 1000.0, 0.05
SOON_S = 10.0
"""Seconds within which a wait of `LONG_S` must have been ended, even on a busy machine."""


@pytest.fixture(autouse=True)
def _long_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes_module, "FALLBACK_POLL_S", LONG_S)


async def is_waiting(changes: Changes, poll_s: float) -> bool:
    """Return whether a wait for a change from now on is still going on after twice `SHORT_S`."""
    waiting = asyncio.create_task(changes.wait(changes.count, poll_s))
    await asyncio.wait({waiting}, timeout=2 * SHORT_S)
    going_on = not waiting.done()
    waiting.cancel()
    return going_on


async def test_waiting_for_changes_lasts_one_poll_interval_if_notifications_are_not_trusted() -> None:
    changes = Changes()
    assert await is_waiting(changes, LONG_S)
    async with asyncio.timeout(SOON_S):
        await changes.wait(changes.count, SHORT_S)


async def test_waiting_for_changes_may_exceed_the_poll_interval_if_notifications_are_trusted() -> None:
    changes = Changes()
    changes.trust(LONG_S)
    assert await is_waiting(changes, SHORT_S)


async def test_waiting_for_changes_ends_after_the_fallback_interval_if_no_notification_arrives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(changes_module, "FALLBACK_POLL_S", SHORT_S)
    changes = Changes()
    changes.trust(LONG_S)
    async with asyncio.timeout(SOON_S):
        await changes.wait(changes.count, SHORT_S)


async def test_waiting_for_changes_ends_at_the_timeout_even_if_notifications_are_trusted() -> None:
    changes = Changes()
    changes.trust(LONG_S)
    async with asyncio.timeout(SOON_S):
        await changes.wait(changes.count, LONG_S, within_s=SHORT_S)


async def test_poll_interval_applies_again_when_trust_in_notifications_has_expired() -> None:
    changes = Changes()
    changes.trust(SHORT_S)
    await asyncio.sleep(SHORT_S)
    async with asyncio.timeout(SOON_S):
        await changes.wait(changes.count, SHORT_S)


async def test_announced_store_change_wakes_all_waiting_tasks() -> None:
    changes = Changes()
    waits = [asyncio.create_task(changes.wait(changes.count, LONG_S)) for _ in range(3)]
    await asyncio.sleep(SHORT_S)
    changes.announce()
    async with asyncio.timeout(SOON_S):
        await asyncio.gather(*waits)


async def test_change_announced_during_a_read_is_not_missed() -> None:
    changes = Changes()
    count = changes.count
    changes.announce()
    async with asyncio.timeout(SOON_S):
        await changes.wait(count, LONG_S)


async def test_change_is_not_missed_at_any_event_loop_step_during_the_wait() -> None:
    changes = Changes()
    for steps in range(20):
        count = changes.count
        waiting = asyncio.create_task(changes.wait(count, LONG_S))
        for _ in range(steps):
            await asyncio.sleep(0)
        changes.announce()
        async with asyncio.timeout(SOON_S):
            await waiting


@pytest.mark.parametrize("heard", [True, False])
async def test_waiting_tasks_wake_up_when_notifications_become_trusted_or_untrusted(heard: bool) -> None:
    changes = Changes()
    if heard:
        changes.trust(LONG_S)
    waiting = asyncio.create_task(changes.wait(changes.count, LONG_S))
    await asyncio.sleep(SHORT_S)
    if heard:
        changes.distrust()
    else:
        changes.trust(LONG_S)
    async with asyncio.timeout(SOON_S):
        await waiting


async def test_waiting_tasks_are_not_woken_when_existing_trust_in_notifications_is_extended() -> None:
    changes = Changes()
    changes.trust(LONG_S)
    count = changes.count
    changes.trust(LONG_S)
    assert changes.count == count
