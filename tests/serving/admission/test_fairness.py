"""Tests that keys share places by weight, and that no key can take another's share by sending more."""

import asyncio
import heapq
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.admission.admission import Admission
from serving.admission.errors import OverloadedError, QueueOverflowError, QueueTimeoutError
from serving.admission.queue import Place, RequestQueue
from serving.admission.tenant import NO_KEY, Tenant
from tests.serving.admission.opened import admitted, open_admission, settle
from tests.serving.service import closed

A, B = Tenant("a"), Tenant("b")


@dataclass
class Engine:
    """Model of an engine: a request takes as long as it has tokens, and requests and tokens are limited.

    Attributes:
        parties: tenants that flood the server; each always has `deep` requests in the queue.
        order: tenants in the order in which their requests were given a place.
        served: number of tokens in each tenant's requests.
    """

    parties: Sequence[Tenant]
    costs: random.Random
    most_running: int = 16
    most_tokens: int = 4_000
    deep: int = 2
    now: float = 0.0
    tokens: int = 0
    order: list[str] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)
    waiting: Counter[str] = field(default_factory=Counter)
    running: list[tuple[float, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.queue = RequestQueue(max_queued=10_000)

    def ask(self, tenant: Tenant, tokens: int = 0) -> Place:
        self.waiting[tenant.name] += 1
        return self.queue.join(tenant, tokens or self.costs.randint(1, 1_000))

    def step(self) -> None:
        """Run until the next request ends, then assign the free place."""
        for tenant in self.parties:
            for _ in range(self.deep - self.waiting[tenant.name]):
                self.ask(tenant)
        if self.running:
            self.now, _, ended = heapq.heappop(self.running)
            self.tokens -= ended
        self.queue.give(self._take)

    def fits(self, tokens: int) -> bool:
        return len(self.running) < self.most_running and self.tokens + tokens <= self.most_tokens

    def _take(self, tokens: int) -> bool:
        if not self.fits(tokens):
            return False
        place = self.queue._next()
        assert place is not None
        self.tokens += tokens
        self.order.append(place.tenant.name)
        self.served[place.tenant.name] += tokens
        self.waiting[place.tenant.name] -= 1
        heapq.heappush(self.running, (self.now + tokens, place.number, tokens))
        return True


@pytest.mark.slow
@settings(max_examples=3, deadline=None)
@given(weights=st.lists(st.integers(1, 5), min_size=50, max_size=50), seed=st.integers(0, 2**32))
def test_each_of_fifty_flooding_keys_gets_throughput_within_ten_percent_of_its_weighted_share(
    weights: list[int], seed: int
) -> None:
    async def run() -> None:
        parties = [Tenant(f"k{number}", weight) for number, weight in enumerate(weights)]
        engine = Engine(parties, random.Random(seed))
        for _ in range(10_000):
            engine.step()
        total = engine.served.total()
        for tenant in parties:
            due = total * tenant.weight / sum(weights)
            assert abs(engine.served[tenant.name] - due) <= 0.1 * due

    asyncio.run(run())


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.integers(1, 10), min_size=2, max_size=8),
    seed=st.integers(0, 2**32),
    before=st.integers(0, 200),
    weight=st.integers(1, 10),
)
def test_small_tenant_waits_for_at_most_one_request_per_other_tenant(
    weights: list[int], seed: int, before: int, weight: int
) -> None:
    async def run() -> None:
        engine = Engine([Tenant(f"k{number}", each) for number, each in enumerate(weights)], random.Random(seed))
        for _ in range(before):
            engine.step()
        engine.order.clear()
        little = engine.ask(Tenant("little", weight), 1)
        while not little.given.done():
            engine.step()
        passed = Counter(engine.order[: engine.order.index("little")])
        assert max(passed.values(), default=0) <= 1

    asyncio.run(run())


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), keys=st.integers(1, 6), steps=st.integers(1, 120))
def test_no_slot_stays_free_if_the_next_queued_request_fits(seed: int, keys: int, steps: int) -> None:
    async def run() -> None:
        chance = random.Random(seed)
        engine = Engine([], chance)
        for _ in range(steps):
            for _ in range(chance.randint(0, 3)):
                engine.ask(Tenant(f"k{chance.randrange(keys)}", chance.randint(1, 5)))
            engine.step()
            if head := engine.queue._next():
                assert not engine.fits(head.tokens)

    asyncio.run(run())


async def served_in_order(admission: Admission, asked: Sequence[tuple[Tenant, int]]) -> list[str]:
    """Return the order in which requests that arrive together while admission is closed are given a place."""
    order = list[str]()

    async def client(tenant: Tenant, tokens: int) -> None:
        async with admitted(admission, tokens, tenant):
            order.append(tenant.name)
            await asyncio.sleep(0)

    async with closed(admission):
        tasks = [asyncio.create_task(client(tenant, tokens)) for tenant, tokens in asked]
        await settle()
    await asyncio.gather(*tasks)
    return order


class TestAfterASwap:
    """Tests requests that waited for an engine."""

    async def test_queued_requests_of_two_keys_are_served_alternately_after_a_swap(self) -> None:
        order = await served_in_order(open_admission(max_running=1), [(A, 10)] * 4 + [(B, 10)] * 2)
        assert order == ["a", "b", "a", "b", "a", "a"]

    async def test_scheduling_order_depends_on_the_number_of_requested_tokens(self) -> None:
        order = await served_in_order(open_admission(max_running=1), [(A, 40), (A, 40), *[(B, 10)] * 4])
        assert order == ["a", "b", "b", "b", "b", "a"]

    async def test_scheduling_order_depends_on_tenant_weights(self) -> None:
        heavy = Tenant("b", weight=2)
        order = await served_in_order(open_admission(max_running=1), [(A, 10)] * 2 + [(heavy, 10)] * 4)
        assert order == ["a", "b", "b", "a", "b", "b"]

    async def test_all_requests_without_a_key_belong_to_one_tenant(self) -> None:
        order = await served_in_order(open_admission(max_running=1), [(NO_KEY, 10)] * 3 + [(A, 10)])
        assert order == ["", "a", "", ""]


class TestFull:
    """Tests admission while all places are taken."""

    async def test_request_with_a_key_waits_if_all_slots_are_taken(self) -> None:
        admission, order = open_admission(max_running=1), list[str]()
        async with admitted(admission, 1, A):
            waiting = asyncio.create_task(enter(admission, B, order))
            await settle()
            assert (admission.queued, order) == (1, [])
        await waiting
        assert order == ["b"]

    async def test_request_without_a_key_is_rejected_if_all_slots_are_taken(self) -> None:
        admission = open_admission(max_running=1)
        async with admitted(admission, 1, A):
            with pytest.raises(OverloadedError, match="the server is at capacity: 1 requests"):
                async with admitted(admission, 1):
                    pass

    async def test_requests_without_a_key_get_their_share_while_keyed_requests_wait(self) -> None:
        admission, order = open_admission(max_running=1), list[str]()
        async with admitted(admission, 1, A):
            waiting = [asyncio.create_task(enter(admission, tenant, order)) for tenant in (A, A, A, NO_KEY)]
            await settle()
        await asyncio.gather(*waiting)
        assert order == ["", "a", "a", "a"]

    async def test_flood_from_one_key_does_not_delay_other_keys(self) -> None:
        admission, order = open_admission(max_running=1, max_queued=100), list[str]()
        async with admitted(admission, 1, A):
            flood = [asyncio.create_task(enter(admission, A, order)) for _ in range(50)]
            await settle()
            other = asyncio.create_task(enter(admission, B, order))
            await settle()
        await asyncio.gather(*flood, other)
        assert order.index("b") <= 1

    async def test_request_at_the_head_of_the_queue_is_not_overtaken(self) -> None:
        admission, order = open_admission(max_tokens=100), list[str]()
        async with admitted(admission, 60, A):
            large = asyncio.create_task(enter(admission, B, order, 60))
            await settle()
            small = asyncio.create_task(enter(admission, B, order, 10))
            await settle()
            assert order == []
        await asyncio.gather(large, small)

    async def test_small_request_runs_immediately_while_a_large_request_of_a_different_tenant_waits(self) -> None:
        admission, order = open_admission(max_tokens=100), list[str]()
        async with admitted(admission, 60, A):
            large = asyncio.create_task(enter(admission, A, order, 60))
            await settle()
            await enter(admission, B, order, 10)
            assert order == ["b"]
        await large

    async def test_wait_timeout_error_reports_wait_time_and_running_requests(self) -> None:
        admission = open_admission(max_running=1, queue_timeout_s=0.01)
        async with admitted(admission, 1, A):
            with pytest.raises(OverloadedError, match=r"waiting 0\.01 s.*1 requests with up to"):
                async with admitted(admission, 1, B):
                    pass
        assert admission.queued == 0

    async def test_request_is_rejected_immediately_if_the_queue_is_full(self) -> None:
        admission = open_admission(max_running=1, max_queued=0)
        async with admitted(admission, 1, A):
            with pytest.raises(OverloadedError):
                async with admitted(admission, 1, B):
                    pass

    async def test_request_during_a_swap_is_rejected_if_the_queue_is_full_or_the_wait_times_out(self) -> None:
        admission = open_admission(max_queued=0)
        async with closed(admission):
            with pytest.raises(QueueOverflowError):
                async with admitted(admission, 1, A):
                    pass
        admission = open_admission(queue_timeout_s=0.01)
        async with closed(admission):
            with pytest.raises(QueueTimeoutError):
                async with admitted(admission, 1, A):
                    pass


class TestFullQueue:
    """Tests that one key cannot fill the queue."""

    async def test_newest_request_of_the_largest_tenant_is_dropped_when_the_queue_is_full(self) -> None:
        queue = RequestQueue(max_queued=4)
        places = [queue.join(A, 1) for _ in range(4)]
        mine = queue.join(B, 1)
        assert isinstance(places[3].given.exception(), QueueOverflowError)
        assert len(queue) == 4
        assert not any(place.given.done() for place in (*places[:3], mine))

    async def test_new_tenant_displaces_queued_requests_of_another_until_both_have_equal_shares(self) -> None:
        queue = RequestQueue(max_queued=4)
        places = [queue.join(A, 1) for _ in range(4)]
        queue.join(B, 1)
        queue.join(B, 1)
        with pytest.raises(QueueOverflowError):
            queue.join(B, 1)
        assert [place.given.done() for place in places] == [False, False, True, True]
        for place in places[2:]:
            place.given.exception()

    async def test_queue_shares_depend_on_tenant_weights(self) -> None:
        queue = RequestQueue(max_queued=4)
        places = [queue.join(A, 1) for _ in range(4)]
        heavy = [queue.join(Tenant("b", weight=3), 1) for _ in range(3)]
        assert sum(place.given.done() for place in places) == 3
        assert not any(place.given.done() for place in heavy)
        for place in places[1:]:
            place.given.exception()

    async def test_full_queue_rejects_a_new_request_if_no_tenant_has_more_than_one_request_queued(self) -> None:
        queue = RequestQueue(max_queued=1)
        first = queue.join(A, 1)
        for tenant in (A, B):
            with pytest.raises(QueueOverflowError):
                queue.join(tenant, 1)
        assert not first.given.done()


async def test_idle_tenant_builds_up_neither_credit_nor_debt() -> None:
    queue, order = RequestQueue(max_queued=100), list[str]()
    for _ in range(1000):
        queue.charge(A, 10)
    waiting = [queue.join(tenant, 10) for tenant in (A, A, B, B)]

    def take(tokens: int) -> bool:
        return True

    for place in waiting:
        place.given.add_done_callback(lambda _, name=place.tenant.name: order.append(name))  # type: ignore[misc]
    queue.give(take)
    await settle()
    assert order == ["b", "a", "b", "a"]


async def test_tenant_is_not_charged_for_a_request_that_left_the_queue() -> None:
    queue, admitted = RequestQueue(max_queued=100), list[Place]()
    gone = [asyncio.create_task(queue.until_given(queue.join(A, 1000), 60, lambda: None)) for _ in range(5)]
    await settle()
    for task in gone:
        task.cancel()
    await asyncio.wait(gone)
    waiting = [queue.join(A, 10), queue.join(B, 10)]

    def take(tokens: int) -> bool:
        admitted.extend(place for place in waiting if place not in admitted and queue._next() is place)
        return True

    queue.give(take)
    assert [place.tenant.name for place in admitted] == ["a", "b"]
    assert len(queue) == 0


async def test_repeatedly_cancelled_requests_leave_no_queue_entries() -> None:
    queue = RequestQueue(max_queued=100)
    queue.join(A, 10)
    for _ in range(1000):
        task = asyncio.create_task(queue.until_given(queue.join(B, 10), 60, lambda: None))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    assert len(queue) == 1
    assert len(queue._waiting) == 1


async def enter(admission: Admission, tenant: Tenant, order: list[str], tokens: int = 1) -> None:
    """Run a request that records its position in the order."""
    async with admitted(admission, tokens, tenant):
        order.append(tenant.name)
        await asyncio.sleep(0)
