"""Admission: order, bounds, and exact counts whatever is cancelled when."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.admission import (
    Admission,
    AdmissionError,
    BackgroundSlotEndedError,
    EngineUnavailableError,
    OverloadedError,
    QueueOverflowError,
    QueueTimeoutError,
    TooManyTokensError,
)
from tests.serving.service import closed


def open_admission(
    *, max_running: int = 8, max_tokens: int = 800, max_queued: int = 8, queue_timeout_s: float = 60.0
) -> Admission:
    admission = Admission(
        max_running=max_running, max_tokens=max_tokens, max_queued=max_queued, queue_timeout_s=queue_timeout_s
    )
    admission.available()
    return admission


async def drained(admission: Admission, timeout_s: float) -> None:
    """Until nothing runs, the server's own request among it."""
    async with asyncio.timeout(timeout_s):
        while admission.running or admission._background_slot is not None:
            await asyncio.sleep(0)


async def settle() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


async def run_until(admission: Admission, end: asyncio.Event) -> None:
    async with admission.admit():
        await end.wait()


async def test_a_request_is_counted_while_it_runs() -> None:
    admission = open_admission()
    async with admission.admit():
        assert admission.running == 1
    assert admission.running == 0


async def test_the_most_that_waited_is_known_when_they_have_gone() -> None:
    admission = open_admission()
    async with closed(admission):
        waiting = [asyncio.create_task(run_until(admission, asyncio.Event())) for _ in range(3)]
        await settle()
        for task in waiting:
            task.cancel()
        await settle()
        assert (admission.queued, admission.most_queued) == (0, 3)
    async with closed(admission):
        assert admission.most_queued == 0


async def test_a_request_that_fails_gives_its_place_back() -> None:
    admission = open_admission()
    with suppress(ValueError):
        async with admission.admit():
            raise ValueError
    assert admission.running == 0


async def test_one_more_than_may_run_is_refused() -> None:
    admission = open_admission(max_running=1)
    async with admission.admit():
        with pytest.raises(OverloadedError):
            async with admission.admit():
                pass
    assert admission.running == 0


async def test_requests_at_a_closed_door_wait_and_enter_in_order() -> None:
    admission, entered = open_admission(), list[int]()

    async def client(number: int) -> None:
        async with admission.admit():
            entered.append(number)

    async with closed(admission):
        tasks = [asyncio.create_task(client(number)) for number in range(5)]
        await settle()
        assert (admission.queued, entered) == (5, [])
    await asyncio.gather(*tasks)
    assert entered == [0, 1, 2, 3, 4]


async def test_one_more_than_may_wait_is_refused() -> None:
    admission, end = open_admission(max_queued=1), asyncio.Event()
    async with closed(admission):
        task = asyncio.create_task(run_until(admission, end))
        await settle()
        with pytest.raises(QueueOverflowError):
            async with admission.admit():
                pass
    end.set()
    await task


async def test_a_request_waits_no_longer_than_it_may() -> None:
    admission = open_admission(queue_timeout_s=0.01)
    async with closed(admission):
        with pytest.raises(QueueTimeoutError):
            async with admission.admit():
                pass
        assert admission.queued == 0


async def test_more_requests_are_held_than_may_run_and_each_gets_its_turn() -> None:
    admission, entered = open_admission(max_running=2), list[int]()

    async def client(number: int) -> None:
        async with admission.admit():
            entered.append(number)
            assert admission.running <= 2
            await asyncio.sleep(0)

    async with closed(admission):
        tasks = [asyncio.create_task(client(number)) for number in range(7)]
        await settle()
    await asyncio.gather(*tasks)
    assert entered == list(range(7))


async def test_the_door_opens_when_a_swap_fails() -> None:
    admission = open_admission()
    with suppress(ValueError):
        async with closed(admission):
            raise ValueError
    async with admission.admit():
        assert admission.running == 1


async def test_the_door_is_closed_by_one_swap_at_a_time() -> None:
    admission = open_admission()
    async with closed(admission):
        with pytest.raises(RuntimeError):
            async with closed(admission):
                pass


async def test_where_another_engine_takes_requests_they_do_not_wait_for_the_one_that_is_changed() -> None:
    admission = open_admission()
    async with admission.changing(), admission.admit():
        assert admission.running == 1
    assert admission.closed_s is None


async def test_requests_wait_from_the_moment_in_which_the_other_engine_is_gone() -> None:
    admission, end = open_admission(), asyncio.Event()
    end.set()
    async with admission.changing():
        admission.unavailable("the engine has failed")
        task = asyncio.create_task(run_until(admission, end))
        await settle()
        assert admission.queued == 1
        admission.available()
        await task
    assert admission.closed_s is not None


async def test_without_a_change_nobody_waits_for_an_engine_to_come_back() -> None:
    admission = open_admission()
    admission.unavailable(None)
    with pytest.raises(EngineUnavailableError, match="being changed"):
        async with admission.admit():
            pass


async def test_without_an_engine_requests_are_refused_with_the_reason() -> None:
    admission = Admission(max_running=1, max_tokens=100, max_queued=1, queue_timeout_s=1)
    with pytest.raises(EngineUnavailableError, match="starting"):
        async with admission.admit():
            pass


async def test_a_swap_that_restarts_the_engine_keeps_what_it_holds() -> None:
    admission, end = open_admission(), asyncio.Event()
    end.set()
    async with admission.changing():
        admission.unavailable(None)
        task = asyncio.create_task(run_until(admission, end))
        await settle()
        admission.unavailable("the engine is starting")
        await settle()
        assert admission.queued == 1
        admission.available()
    await task


async def test_a_swap_that_ends_without_an_engine_sends_away_what_it_held() -> None:
    admission = open_admission()
    async with admission.changing():
        admission.unavailable(None)
        task = asyncio.create_task(run_until(admission, asyncio.Event()))
        await settle()
        admission.unavailable("the engine failed")
    with pytest.raises(EngineUnavailableError):
        await task
    assert (admission.running, admission.queued) == (0, 0)


async def test_a_client_that_leaves_in_the_tick_it_is_admitted_leaves_no_trace() -> None:
    admission = open_admission()
    async with closed(admission):
        task = asyncio.create_task(run_until(admission, asyncio.Event()))
        await settle()
    task.cancel()
    await asyncio.wait([task])
    assert (admission.running, admission.queued) == (0, 0)


async def ask_in_background(admission: Admission, end: asyncio.Event, patience_s: float = 60.0) -> str:
    """A question of the server's own; how it ended."""
    try:
        async with admission.background_slot(patience_s):
            await end.wait()
    except BackgroundSlotEndedError:
        return "cut off"
    return "answered"


async def test_a_question_of_the_servers_own_is_no_request() -> None:
    admission = open_admission(max_running=1)
    async with admission.background_slot(1):
        assert admission.running == 0
        async with admission.admit():
            assert admission.running == 1
    assert admission.running == 0


async def test_it_waits_for_a_moment_without_requests() -> None:
    admission, last, end = open_admission(), asyncio.Event(), asyncio.Event()
    first = asyncio.create_task(run_until(admission, end))
    second = asyncio.create_task(run_until(admission, last))
    await settle()
    question = asyncio.create_task(ask_in_background(admission, asyncio.Event()))
    end.set()
    await first
    await settle()
    assert admission._background_slot is None
    last.set()
    await second
    await settle()
    assert admission._background_slot is not None
    question.cancel()
    await asyncio.wait([question])


async def test_it_goes_beside_requests_when_its_patience_ends() -> None:
    admission, end = open_admission(), asyncio.Event()
    async with admission.admit():
        question = asyncio.create_task(ask_in_background(admission, end, patience_s=0.01))
        await settle()
        assert admission._background_slot is None
        end.set()
        assert await question == "answered"


async def test_it_is_not_given_at_a_closed_door_however_long_it_waits() -> None:
    admission, end = open_admission(), asyncio.Event()
    end.set()
    async with closed(admission):
        question = asyncio.create_task(ask_in_background(admission, end, patience_s=0.0))
        await asyncio.sleep(0.02)
        assert not question.done()
    assert await question == "answered"


async def test_it_is_not_given_without_an_engine() -> None:
    admission, end = Admission(max_running=1, max_tokens=100, max_queued=1, queue_timeout_s=1), asyncio.Event()
    end.set()
    question = asyncio.create_task(ask_in_background(admission, end, patience_s=0.0))
    await asyncio.sleep(0.02)
    assert not question.done()
    admission.available()
    assert await question == "answered"


async def test_a_swap_cuts_it_off_and_waits_until_it_has_gone() -> None:
    admission, left = open_admission(), asyncio.Event()

    async def ask() -> None:
        with suppress(BackgroundSlotEndedError):
            async with admission.background_slot(60):
                try:
                    await asyncio.sleep(60)
                finally:
                    await left.wait()  # the connection to the engine takes a moment to close

    question = asyncio.create_task(ask())
    await settle()
    async with closed(admission):
        gone = asyncio.create_task(drained(admission, 5))
        await settle()
        assert not gone.done()
        left.set()
        await gone
    await question


async def test_the_end_of_the_engine_cuts_it_off() -> None:
    admission = open_admission()
    question = asyncio.create_task(ask_in_background(admission, asyncio.Event()))
    await settle()
    admission.unavailable("the engine failed")
    admission.unavailable("the engine is starting")
    assert await question == "cut off"
    async with closed(admission):
        await drained(admission, 0.1)


async def test_an_end_in_the_moment_of_its_answer_leaves_nothing_behind() -> None:
    """A cancellation that comes too late must not reach what the task does next."""
    for turns in range(6):
        admission, end = open_admission(), asyncio.Event()

        async def ask_and_go_on(admission: Admission = admission, end: asyncio.Event = end) -> str:
            how = await ask_in_background(admission, end)
            await asyncio.sleep(0.001)
            return how

        question = asyncio.create_task(ask_and_go_on())
        await settle()
        end.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        async with closed(admission):
            await drained(admission, 0.1)
        assert await question in ("answered", "cut off")


async def test_a_timeout_of_its_own_is_no_end_of_the_engine() -> None:
    admission = open_admission()
    with pytest.raises(TimeoutError):
        async with admission.background_slot(1), asyncio.timeout(0.001):
            await asyncio.sleep(1)
    async with admission.background_slot(1):
        pass


async def test_questions_come_one_at_a_time() -> None:
    admission = open_admission()
    async with admission.background_slot(1):
        with pytest.raises(RuntimeError, match="already"):
            async with admission.background_slot(1):
                pass
        assert admission._background_slot is not None


@dataclass
class World:
    """Admission, its clients, its swaps and the server's own requests, with the counts as they must be."""

    admission: Admission
    version: int = 1
    arrived: int = 0
    clients: dict[int, tuple[asyncio.Task[None], asyncio.Event]] = field(default_factory=dict)
    inside: set[int] = field(default_factory=set)
    admitted_after_wait: list[int] = field(default_factory=list)
    mixed: bool = False
    swap: tuple[asyncio.Task[None], asyncio.Event] | None = None
    question: tuple[asyncio.Task[None], asyncio.Event] | None = None
    asking: bool = False
    dead: bool = False

    async def client(self, number: int, end: asyncio.Event) -> None:
        waits = self.admission._closed
        with suppress(AdmissionError):
            async with self.admission.admit():
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
        with suppress(BackgroundSlotEndedError):
            async with self.admission.background_slot(patience_s):
                seen, self.asking = self.version, True
                self.mixed |= self.admission._closed or self.admission.unavailable_reason is not None
                try:
                    await end.wait()
                finally:
                    self.asking = False
                    self.mixed |= self.version != seen

    async def change_version(self, end: asyncio.Event) -> None:
        async with self.admission.changing():
            self.admission.unavailable(None)
            try:
                await drained(self.admission, 60)
                self.version += 1
                await end.wait()
            finally:
                if not self.dead:
                    self.admission.available()

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
                self.swap = None if self.admission._changing else self.swap
            case "ask" if self.question is None or self.question[0].done():
                end = asyncio.Event()
                self.question = asyncio.create_task(self.ask(end, 60.0 if choice % 2 else 0.0)), end
            case "answer" if self.question:
                self.question[1].set()
                if choice % 3 == 0:  # the server ends
                    self.question[0].cancel()
            case "die":
                self.dead = True
                self.admission.unavailable("gone")
            case "revive":  # by another engine, where one is being changed
                self.dead = False
                self.admission.available()

    def check(self) -> None:
        admission = self.admission
        alive = {number for number, (task, _) in self.clients.items() if not task.done()}
        assert admission.running == len(self.inside)
        assert admission.queued == len(alive - self.inside)
        assert 0 <= admission.running <= admission._max_running
        assert 0 <= admission.queued <= admission._max_queued
        assert self.admitted_after_wait == sorted(self.admitted_after_wait)
        assert not self.mixed
        assert (admission._background_slot is not None) == self.asking
        assert not (self.asking and admission._closed)

    async def wind_up(self) -> None:
        if self.swap:
            self.swap[0].cancel()
        if self.question:
            self.question[1].set()
        for _, end in self.clients.values():
            end.set()
        self.admission.available()
        if self.clients:
            await asyncio.wait([task for task, _ in self.clients.values()], timeout=5)
        if self.question:
            await asyncio.wait([self.question[0]], timeout=5)
            assert self.question[0].done()
        await drained(self.admission, 1)
        assert (self.admission.running, self.admission.queued) == (0, 0)


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
        world = World(open_admission(max_running=limits[0], max_queued=limits[1]))
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


class TestTokens:
    """A request counts by what its answers may take."""

    async def test_one_that_asks_for_what_is_left_runs(self) -> None:
        admission = open_admission(max_tokens=100)
        async with admission.admit(60), admission.admit(40):
            assert admission.running == 2

    async def test_one_that_asks_for_more_than_is_left_is_refused(self) -> None:
        admission = open_admission(max_tokens=100)
        async with admission.admit(60):
            with pytest.raises(OverloadedError, match="may make 60 tokens"):
                async with admission.admit(41):
                    pass

    async def test_what_has_ended_counts_no_more(self) -> None:
        admission = open_admission(max_tokens=100)
        for _ in range(3):
            async with admission.admit(100):
                assert admission.running == 1

    async def test_one_that_could_never_run_is_told_so(self) -> None:
        with pytest.raises(TooManyTokensError, match="101"):
            async with open_admission(max_tokens=100).admit(101):
                pass

    async def test_queued_ones_run_as_tokens_are_given_back(self) -> None:
        admission, end, began = open_admission(max_tokens=100), asyncio.Event(), list[int]()

        async def run(tokens: int) -> None:
            async with admission.admit(tokens):
                began.append(tokens)
                await end.wait()

        async with closed(admission):
            tasks = [asyncio.create_task(run(tokens)) for tokens in (70, 60, 20)]
            await settle()
        await settle()
        assert began == [70]  # in arrival order: 20 would fit, and 60 might then never run
        end.set()
        await asyncio.gather(*tasks)
        assert began == [70, 60, 20]


async def test_requests_for_an_engine_that_comes_when_it_is_asked_wait_for_it() -> None:
    admission = open_admission()
    admission.sleep()
    admission.unavailable(None)
    assert admission.unavailable_reason is None
    waiting = asyncio.create_task(admit_once(admission))
    async with asyncio.timeout(1):
        await admission.wanted()
    admission.available()
    await waiting
    admission.wake()
    admission.unavailable("the engine has failed")
    with pytest.raises(EngineUnavailableError):
        await admit_once(admission)


async def test_those_that_wait_are_sent_away_where_it_does_not_come() -> None:
    admission = open_admission()
    admission.sleep()
    admission.unavailable(None)
    waiting = asyncio.create_task(admit_once(admission))
    await admission.wanted()
    admission.unavailable("the engine has failed")
    admission.wake()
    with pytest.raises(EngineUnavailableError, match="has failed"):
        await waiting


async def test_they_wait_as_long_as_a_start_may_take() -> None:
    admission = Admission(max_running=1, max_tokens=9, max_queued=9, queue_timeout_s=0.01, wake_timeout_s=0.2)
    admission.sleep()
    admission.unavailable(None)
    began = time.monotonic()
    with pytest.raises(QueueTimeoutError, match=r"0\.2 s for an engine"):
        await admit_once(admission)
    assert time.monotonic() - began >= 0.2


async def test_idle_is_the_time_since_the_last_request_ended() -> None:
    admission = open_admission()
    async with admission.admit():
        await asyncio.sleep(0.05)
        assert admission.idle_s == 0
    assert admission.idle_s < 0.04
    await asyncio.sleep(0.05)
    assert admission.idle_s >= 0.05


async def admit_once(admission: Admission) -> None:
    async with admission.admit():
        pass
