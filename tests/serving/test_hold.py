"""The door: order, bounds, and exact counts whatever is cancelled when."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.hold import (
    Admission,
    AdmissionError,
    EngineUnavailableError,
    HoldOverflowError,
    HoldTimeoutError,
    OverloadedError,
)


def open_door(*, max_running: int = 8, max_held: int = 8, hold_timeout_s: float = 60.0) -> Admission:
    door = Admission(max_running=max_running, max_held=max_held, hold_timeout_s=hold_timeout_s)
    door.available()
    return door


async def settle() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


async def run_until(door: Admission, end: asyncio.Event) -> None:
    async with door.admit():
        await end.wait()


async def test_a_request_is_counted_while_it_runs() -> None:
    door = open_door()
    async with door.admit():
        assert door.running == 1
    assert door.running == 0


async def test_a_request_that_fails_gives_its_place_back() -> None:
    door = open_door()
    with suppress(ValueError):
        async with door.admit():
            raise ValueError
    assert door.running == 0


async def test_one_more_than_may_run_is_refused() -> None:
    door = open_door(max_running=1)
    async with door.admit():
        with pytest.raises(OverloadedError):
            async with door.admit():
                pass
    assert door.running == 0


async def test_requests_at_a_closed_door_wait_and_enter_in_order() -> None:
    door, entered = open_door(), list[int]()

    async def client(number: int) -> None:
        async with door.admit():
            entered.append(number)

    async with door.closed():
        tasks = [asyncio.create_task(client(number)) for number in range(5)]
        await settle()
        assert (door.held, entered) == (5, [])
    await asyncio.gather(*tasks)
    assert entered == [0, 1, 2, 3, 4]


async def test_one_more_than_may_wait_is_refused() -> None:
    door, end = open_door(max_held=1), asyncio.Event()
    async with door.closed():
        task = asyncio.create_task(run_until(door, end))
        await settle()
        with pytest.raises(HoldOverflowError):
            async with door.admit():
                pass
    end.set()
    await task


async def test_a_request_waits_no_longer_than_it_may() -> None:
    door = open_door(hold_timeout_s=0.01)
    async with door.closed():
        with pytest.raises(HoldTimeoutError):
            async with door.admit():
                pass
        assert door.held == 0


async def test_more_requests_are_held_than_may_run_and_each_gets_its_turn() -> None:
    door, entered = open_door(max_running=2), list[int]()

    async def client(number: int) -> None:
        async with door.admit():
            entered.append(number)
            assert door.running <= 2
            await asyncio.sleep(0)

    async with door.closed():
        tasks = [asyncio.create_task(client(number)) for number in range(7)]
        await settle()
    await asyncio.gather(*tasks)
    assert entered == list(range(7))


async def test_drained_returns_when_the_last_request_ends() -> None:
    door, end = open_door(), asyncio.Event()
    task = asyncio.create_task(run_until(door, end))
    await settle()
    async with door.closed():
        drained = asyncio.create_task(door.drained(5))
        await settle()
        assert not drained.done()
        end.set()
        await drained
    await task


async def test_drained_gives_up_after_its_timeout() -> None:
    door = open_door()
    async with door.admit(), door.closed():
        with pytest.raises(TimeoutError):
            await door.drained(0.01)


async def test_the_door_opens_when_a_swap_fails() -> None:
    door = open_door()
    with suppress(ValueError):
        async with door.closed():
            raise ValueError
    async with door.admit():
        assert door.running == 1


async def test_the_door_is_closed_by_one_swap_at_a_time() -> None:
    door = open_door()
    async with door.closed():
        with pytest.raises(RuntimeError):
            async with door.closed():
                pass


async def test_without_an_engine_requests_are_refused_with_the_reason() -> None:
    door = Admission(max_running=1, max_held=1, hold_timeout_s=1)
    with pytest.raises(EngineUnavailableError, match="starting"):
        async with door.admit():
            pass


async def test_a_swap_that_restarts_the_engine_keeps_what_it_holds() -> None:
    door, end = open_door(), asyncio.Event()
    end.set()
    async with door.closed():
        task = asyncio.create_task(run_until(door, end))
        await settle()
        door.unavailable("the engine is starting")
        await settle()
        assert door.held == 1
        door.available()
    await task


async def test_a_swap_that_ends_without_an_engine_sends_away_what_it_held() -> None:
    door = open_door()
    async with door.closed():
        task = asyncio.create_task(run_until(door, asyncio.Event()))
        await settle()
        door.unavailable("the engine failed")
    with pytest.raises(EngineUnavailableError):
        await task
    assert (door.running, door.held) == (0, 0)


async def test_a_client_that_leaves_in_the_tick_it_is_admitted_leaves_no_trace() -> None:
    door = open_door()
    async with door.closed():
        task = asyncio.create_task(run_until(door, asyncio.Event()))
        await settle()
    task.cancel()
    await asyncio.wait([task])
    assert (door.running, door.held) == (0, 0)


@dataclass
class World:
    """A door, its clients and its swaps, with the counts as they must be."""

    door: Admission
    version: int = 1
    arrived: int = 0
    clients: dict[int, tuple[asyncio.Task[None], asyncio.Event]] = field(default_factory=dict)
    inside: set[int] = field(default_factory=set)
    admitted_after_wait: list[int] = field(default_factory=list)
    mixed: bool = False
    swap: tuple[asyncio.Task[None], asyncio.Event] | None = None

    async def client(self, number: int, end: asyncio.Event) -> None:
        waits = self.door._closed
        with suppress(AdmissionError):
            async with self.door.admit():
                seen = self.version
                self.inside.add(number)
                if waits:
                    self.admitted_after_wait.append(number)
                try:
                    await end.wait()
                finally:
                    self.inside.discard(number)
                    self.mixed |= self.version != seen

    async def change_version(self, end: asyncio.Event) -> None:
        async with self.door.closed():
            await self.door.drained(60)
            self.version += 1
            await end.wait()

    def act(self, action: str, choice: int) -> None:
        alive = [number for number, (task, _) in self.clients.items() if not task.done()]
        match action:
            case "arrive":
                end = asyncio.Event()
                self.clients[self.arrived] = asyncio.create_task(self.client(self.arrived, end)), end
                self.arrived += 1
            case "finish" if alive:
                self.clients[alive[choice % len(alive)]][1].set()
            case "leave" if alive:
                self.clients[alive[choice % len(alive)]][0].cancel()
            case "close" if self.swap is None:
                end = asyncio.Event()
                self.swap = asyncio.create_task(self.change_version(end)), end
            case "open" if self.swap:
                task, end = self.swap
                end.set()
                if choice % 2:  # a swap that is given up
                    task.cancel()
                self.swap = None if self.door._closed else self.swap
            case "die":
                self.door.unavailable("gone")
            case "revive":
                self.door.available()

    def check(self) -> None:
        door = self.door
        alive = {number for number, (task, _) in self.clients.items() if not task.done()}
        assert door.running == len(self.inside)
        assert door.held == len(alive - self.inside)
        assert 0 <= door.running <= door._max_running
        assert 0 <= door.held <= door._max_held
        assert self.admitted_after_wait == sorted(self.admitted_after_wait)
        assert not self.mixed

    async def wind_up(self) -> None:
        if self.swap:
            self.swap[0].cancel()
        for _, end in self.clients.values():
            end.set()
        self.door.available()
        if self.clients:
            await asyncio.wait([task for task, _ in self.clients.values()], timeout=5)
        await self.door.drained(1)
        assert (self.door.running, self.door.held) == (0, 0)


ACTIONS = st.sampled_from(["arrive", "arrive", "arrive", "finish", "leave", "close", "open", "die", "revive", "revive"])
BATCH = st.lists(st.tuples(ACTIONS, st.integers(0, 20)), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(
    schedule=st.lists(BATCH, max_size=25),
    limits=st.tuples(st.integers(1, 4), st.integers(0, 5)),
    ticks=st.integers(1, 3),
)
def test_counts_order_bounds_and_versions_hold_under_any_schedule(
    schedule: list[list[tuple[str, int]]], limits: tuple[int, int], ticks: int
) -> None:
    async def run() -> None:
        world = World(open_door(max_running=limits[0], max_held=limits[1]))
        for batch in schedule:
            for action, choice in batch:
                world.act(action, choice)
                if choice % 5 == 0:  # some actions fall into the same tick, some a tick or two apart
                    for _ in range(ticks):
                        await asyncio.sleep(0)
            await settle()
            if world.swap and world.swap[0].done():
                world.swap = None
            world.check()
        await world.wind_up()

    _run(run)


def _run(main: Callable[[], object]) -> None:
    with asyncio.Runner() as runner:
        runner.run(main())  # type: ignore[arg-type]
