"""The journal of swaps: in order, whole, and never in anybody's way."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy.exc import OperationalError

from serving.rollout import journal as module
from serving.rollout.journal import Journal
from svc.store.desired import Desired
from svc.store.swaps import SwapOutcome, SwapRecord, SwapResult, begin_swap, end_swap, find_swap
from tests.serving.versions import NAME, target

DESIRED = Desired(target(2), target(1), 1)


async def ended(store: Store) -> SwapRecord:
    async with asyncio.timeout(3):
        while not (swap := find_swap(store, NAME)) or swap.result is None:
            await asyncio.sleep(0.005)
    return swap


async def test_steps_and_the_end_come_in_order(store: Store) -> None:
    journal = Journal(store)
    swap_id = await journal.begin(DESIRED)
    for number in range(10):
        journal.step(swap_id, str(number))
    result = SwapResult(SwapOutcome.REFUSED, "why", 1.5, 2, 3)
    journal.end(swap_id, result)
    swap = await ended(store)
    assert swap.steps == tuple(str(number) for number in range(10))
    assert swap.result == result


async def test_a_step_returns_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(store)
    swap_id = await journal.begin(DESIRED)
    returned, in_time = threading.Event(), list[bool]()
    monkeypatch.setattr(module, "add_step", lambda *_: in_time.append(returned.wait(3)))
    journal.step(swap_id, "slow")
    returned.set()
    journal.end(swap_id, SwapResult(SwapOutcome.SUCCEEDED))
    await ended(store)
    assert in_time == [True]


async def test_what_the_store_does_not_take_is_written_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "end_swap", _fails_once(end_swap))
    journal = Journal(store)
    journal.end(await journal.begin(DESIRED), SwapResult(SwapOutcome.SUCCEEDED))
    assert (await ended(store)).result == SwapResult(SwapOutcome.SUCCEEDED)


async def test_a_store_that_takes_nothing_begins_no_swap(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "begin_swap", _fails_once(begin_swap))
    with pytest.raises(OperationalError):
        await Journal(store).begin(DESIRED)


def _fails_once(function: Callable[..., Any]) -> Callable[..., Any]:
    failed = False

    def fail_once(*arguments: Any) -> Any:
        nonlocal failed
        if not failed:
            failed = True
            raise OperationalError("insert", {}, Exception("database is locked"))
        return function(*arguments)

    return fail_once
