"""The door: order, bounds, and exact counts whatever is cancelled when."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.admission import (
    Admission,
    AdmissionError,
    AsideEndedError,
    EngineUnavailableError,
    HoldOverflowError,
    HoldTimeoutError,
    OverloadedError,
)


def open_door(*, max_running: int = 8, max_held: int = 8, hold_timeout_s: float = 60.0) -> Admission:
    door = Admission(max_running=max_running, max_held=max_held, hold_timeout_s=hold_timeout_s)
    door.available()
    return door


async def drained(door: Admission, timeout_s: float) -> None:
    """Until nothing runs, the server's own question among it."""
    async with asyncio.timeout(timeout_s):
        while door.running or door._aside is not None:
            await asyncio.sleep(0)


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


def test_as_many_requests_are_read_at_once_as_may_run_and_wait() -> None:
    door = open_door(max_running=1, max_held=1)
    with door.reading():
        with door.reading(), pytest.raises(OverloadedError), door.reading():
            pass
        with door.reading():
            pass


async def test_the_most_that_waited_is_known_when_they_have_gone() -> None:
    door = open_door()
    async with door.closed():
        waiting = [asyncio.create_task(run_until(door, asyncio.Event())) for _ in range(3)]
        await settle()
        for task in waiting:
            task.cancel()
        await settle()
        assert (door.held, door.most_held) == (0, 3)
    async with door.closed():
        assert door.most_held == 0


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


async def ask_aside(door: Admission, end: asyncio.Event, patience_s: float = 60.0) -> str:
    """A question of the server's own; how it ended."""
    try:
        async with door.aside(patience_s):
            await end.wait()
    except AsideEndedError:
        return "cut off"
    return "answered"


async def test_a_question_of_the_servers_own_is_no_request() -> None:
    door = open_door(max_running=1)
    async with door.aside(1):
        assert door.running == 0
        async with door.admit():
            assert door.running == 1
    assert door.running == 0


async def test_it_waits_for_a_moment_without_requests() -> None:
    door, last, end = open_door(), asyncio.Event(), asyncio.Event()
    first = asyncio.create_task(run_until(door, end))
    second = asyncio.create_task(run_until(door, last))
    await settle()
    question = asyncio.create_task(ask_aside(door, asyncio.Event()))
    end.set()
    await first
    await settle()
    assert door._aside is None
    last.set()
    await second
    await settle()
    assert door._aside is not None
    question.cancel()
    await asyncio.wait([question])


async def test_it_goes_beside_requests_when_its_patience_ends() -> None:
    door, end = open_door(), asyncio.Event()
    async with door.admit():
        question = asyncio.create_task(ask_aside(door, end, patience_s=0.01))
        await settle()
        assert door._aside is None
        end.set()
        assert await question == "answered"


async def test_it_is_not_given_at_a_closed_door_however_long_it_waits() -> None:
    door, end = open_door(), asyncio.Event()
    end.set()
    async with door.closed():
        question = asyncio.create_task(ask_aside(door, end, patience_s=0.0))
        await asyncio.sleep(0.02)
        assert not question.done()
    assert await question == "answered"


async def test_it_is_not_given_without_an_engine() -> None:
    door, end = Admission(max_running=1, max_held=1, hold_timeout_s=1), asyncio.Event()
    end.set()
    question = asyncio.create_task(ask_aside(door, end, patience_s=0.0))
    await asyncio.sleep(0.02)
    assert not question.done()
    door.available()
    assert await question == "answered"


async def test_a_swap_cuts_it_off_and_waits_until_it_has_gone() -> None:
    door, left = open_door(), asyncio.Event()

    async def ask() -> None:
        with suppress(AsideEndedError):
            async with door.aside(60):
                try:
                    await asyncio.sleep(60)
                finally:
                    await left.wait()  # the connection to the engine takes a moment to close

    question = asyncio.create_task(ask())
    await settle()
    async with door.closed():
        gone = asyncio.create_task(drained(door, 5))
        await settle()
        assert not gone.done()
        left.set()
        await gone
    await question


async def test_the_end_of_the_engine_cuts_it_off() -> None:
    door = open_door()
    question = asyncio.create_task(ask_aside(door, asyncio.Event()))
    await settle()
    door.unavailable("the engine failed")
    door.unavailable("the engine is starting")
    assert await question == "cut off"
    async with door.closed():
        await drained(door, 0.1)


async def test_an_end_in_the_moment_of_its_answer_leaves_nothing_behind() -> None:
    """A cancellation that comes too late must not reach what the task does next."""
    for turns in range(6):
        door, end = open_door(), asyncio.Event()

        async def ask_and_go_on(door: Admission = door, end: asyncio.Event = end) -> str:
            how = await ask_aside(door, end)
            await asyncio.sleep(0.001)
            return how

        question = asyncio.create_task(ask_and_go_on())
        await settle()
        end.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        async with door.closed():
            await drained(door, 0.1)
        assert await question in ("answered", "cut off")


async def test_a_timeout_of_its_own_is_no_end_of_the_engine() -> None:
    door = open_door()
    with pytest.raises(TimeoutError):
        async with door.aside(1), asyncio.timeout(0.001):
            await asyncio.sleep(1)
    async with door.aside(1):
        pass


async def test_questions_come_one_at_a_time() -> None:
    door = open_door()
    async with door.aside(1):
        with pytest.raises(RuntimeError, match="already"):
            async with door.aside(1):
                pass
        assert door._aside is not None


@dataclass
class World:
    """A door, its clients, its swaps and the server's own questions, with the counts as they must be."""

    door: Admission
    version: int = 1
    arrived: int = 0
    clients: dict[int, tuple[asyncio.Task[None], asyncio.Event]] = field(default_factory=dict)
    inside: set[int] = field(default_factory=set)
    admitted_after_wait: list[int] = field(default_factory=list)
    mixed: bool = False
    swap: tuple[asyncio.Task[None], asyncio.Event] | None = None
    question: tuple[asyncio.Task[None], asyncio.Event] | None = None
    asking: bool = False

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

    async def ask(self, end: asyncio.Event, patience_s: float) -> None:
        with suppress(AsideEndedError):
            async with self.door.aside(patience_s):
                seen, self.asking = self.version, True
                self.mixed |= self.door._closed or self.door.unavailable_reason is not None
                try:
                    await end.wait()
                finally:
                    self.asking = False
                    self.mixed |= self.version != seen

    async def change_version(self, end: asyncio.Event) -> None:
        async with self.door.closed():
            await drained(self.door, 60)
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
            case "ask" if self.question is None or self.question[0].done():
                end = asyncio.Event()
                self.question = asyncio.create_task(self.ask(end, 60.0 if choice % 2 else 0.0)), end
            case "answer" if self.question:
                self.question[1].set()
                if choice % 3 == 0:  # the server ends
                    self.question[0].cancel()
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
        assert (door._aside is not None) == self.asking
        assert not (self.asking and door._closed)

    async def wind_up(self) -> None:
        if self.swap:
            self.swap[0].cancel()
        if self.question:
            self.question[1].set()
        for _, end in self.clients.values():
            end.set()
        self.door.available()
        if self.clients:
            await asyncio.wait([task for task, _ in self.clients.values()], timeout=5)
        if self.question:
            await asyncio.wait([self.question[0]], timeout=5)
            assert self.question[0].done()
        await drained(self.door, 1)
        assert (self.door.running, self.door.held) == (0, 0)


ACTIONS = st.sampled_from(
    ["arrive"] * 3 + ["finish", "leave", "close", "open", "die", "revive", "revive", "ask", "ask", "answer"]
)
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
