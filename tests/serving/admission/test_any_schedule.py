"""Tests that counts, order, limits and versions are correct, whatever arrives, ends or is cancelled."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.admission.admission import Admission
from serving.admission.background_slot import BackgroundSlotEndedError
from serving.admission.errors import AdmissionError
from serving.admission.tenant import NO_KEY, Tenant
from serving.one_shot_event import OneShotEvent
from tests.serving.admission.opened import admitted, drained, open_admission, settle

TENANTS = (NO_KEY, Tenant("a"), Tenant("b", weight=3))


def tokens(choice: int) -> int:
    """Return the size of a request. One of four needs more than half of all tokens."""
    return 1 if choice % 4 else 500


@dataclass
class World:
    """The admission, its clients, its swaps and the server's own requests, with the expected counts."""

    admission: Admission
    max_queued: int
    keys: bool
    version: int = 1
    arrived: int = 0
    clients: dict[int, tuple[asyncio.Task[None], asyncio.Event]] = field(default_factory=dict)
    inside: set[int] = field(default_factory=set)
    admitted_after_wait: dict[str, list[int]] = field(default_factory=lambda: {tenant.name: [] for tenant in TENANTS})
    mixed: bool = False
    entered_closed: bool = False
    swap: tuple[asyncio.Task[None], asyncio.Event] | None = None
    question: tuple[asyncio.Task[None], asyncio.Event] | None = None
    asking: bool = False
    dead: bool = False
    batched: list[tuple[asyncio.Task[None], asyncio.Event]] = field(default_factory=list)
    batched_inside: int = 0

    async def client(self, number: int, tokens: int, tenant: Tenant, end: asyncio.Event) -> None:
        waits = self.admission._closed
        with suppress(AdmissionError):
            async with admitted(self.admission, tokens, tenant):
                seen = self.version
                self.entered_closed |= self.admission._closed
                self.inside.add(number)
                if waits:
                    self.admitted_after_wait[tenant.name].append(number)
                try:
                    await end.wait()
                finally:
                    self.inside.discard(number)
                    self.mixed |= self.version != seen

    async def ask(self, end: asyncio.Event, patience_s: float) -> None:
        with suppress(BackgroundSlotEndedError):
            async with self.admission.background_slot.take(patience_s):
                seen, self.asking = self.version, True
                self.mixed |= self.admission._closed or self.admission.unavailable_reason is not None
                try:
                    await end.wait()
                finally:
                    self.asking = False
                    self.mixed |= self.version != seen

    async def batch(self, tokens: int, end: asyncio.Event) -> None:
        interruption = OneShotEvent()
        interruption.listen(end.set)
        async with admitted(self.admission, tokens, Tenant("a", 1, interruption)):
            seen = self.version
            self.batched_inside += 1
            try:
                await end.wait()
            finally:
                self.batched_inside -= 1
                self.mixed |= self.version != seen

    async def change_version(self, end: asyncio.Event) -> None:
        async with self.admission.changing():
            self.admission.unavailable(None)
            try:
                await drained(self.admission, 60)
                while self.batched_inside:  # the engine itself counts them
                    await asyncio.sleep(0)
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
                tenant = TENANTS[choice % len(TENANTS)] if self.keys else NO_KEY
                self.clients[self.arrived] = (
                    asyncio.create_task(self.client(self.arrived, tokens(choice), tenant, end)),
                    end,
                )
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
                if choice % 2:  # a swap that is cancelled
                    task.cancel()
                self.swap = None if self.admission._changing else self.swap
            case "ask" if self.question is None or self.question[0].done():
                end = asyncio.Event()
                self.question = asyncio.create_task(self.ask(end, 60.0 if choice % 2 else 0.0)), end
            case "answer" if self.question:
                self.question[1].set()
                if choice % 3 == 0:  # the server stops
                    self.question[0].cancel()
            case "batch":
                end = asyncio.Event()
                self.batched.append((asyncio.create_task(self.batch(tokens(choice), end)), end))
            case "end batch" if self.batched:
                task, end = self.batched.pop(choice % len(self.batched))
                end.set()
                if choice % 2:
                    task.cancel()
            case "die":
                self.dead = True
                self.admission.unavailable("gone")
            case "revive":  # by another engine, where one is being changed
                self.dead = False
                self.admission.available()

    def has_room(self, tokens: int) -> bool:
        admission = self.admission
        return admission.running < admission.max_running and admission._tokens + tokens <= admission.max_tokens

    def check(self) -> None:
        admission = self.admission
        alive = {number for number, (task, _) in self.clients.items() if not task.done()}
        assert admission.running == len(self.inside)
        assert admission.queued == len(alive - self.inside)
        assert 0 <= admission.running <= admission.max_running
        # Places that were given back unused are queued again beside those.
        assert 0 <= admission.queued <= self.max_queued + admission.max_running
        assert all(admitted == sorted(admitted) for admitted in self.admitted_after_wait.values())
        assert admission._closed or not (head := admission.queue._next()) or not self.has_room(head.tokens)
        waiting_batch = next(iter(admission.batch_slots._waiting), None)
        assert not waiting_batch or not admission._has_spare(waiting_batch.tokens)
        assert self.batched_inside == admission.batch_slots.running
        assert not self.batched_inside or not admission._has_excess()
        assert not self.mixed
        assert not self.entered_closed
        assert bool(admission.background_slot.taken) == self.asking
        assert not (self.asking and admission._closed)

    async def wind_up(self) -> None:
        if self.swap:
            self.swap[0].cancel()
        if self.question:
            self.question[1].set()
        for _, end in self.clients.values():
            end.set()
        self.admission.available()
        for task, _ in self.batched:
            task.cancel()
        if self.clients:
            await asyncio.wait([task for task, _ in self.clients.values()], timeout=5)
        if self.question:
            await asyncio.wait([self.question[0]], timeout=5)
            assert self.question[0].done()
        await drained(self.admission, 1)
        await settle()
        assert not self.admission.batch_slots.busy
        assert (self.admission.running, self.admission.queued) == (0, 0)


ACTIONS = st.sampled_from(
    ["arrive"] * 3
    + ["batch", "batch", "end batch"]
    + ["finish", "leave", "close", "open", "die", "revive", "revive", "ask", "ask", "answer"]
)


BATCH = st.lists(st.tuples(ACTIONS, st.integers(0, 20)), min_size=1, max_size=4)


@pytest.mark.slow
@settings(max_examples=6 * settings().max_examples, deadline=None)
@given(
    schedule=st.lists(BATCH, max_size=25),
    limits=st.tuples(st.integers(1, 4), st.integers(0, 5)),
    ticks=st.integers(1, 3),
    keys=st.booleans(),
)
def test_admission_invariants_hold_under_any_schedule(
    schedule: list[list[tuple[str, int]]], limits: tuple[int, int], ticks: int, keys: bool
) -> None:
    async def run() -> None:
        world = World(open_admission(max_running=limits[0], max_queued=limits[1]), limits[1], keys)
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
