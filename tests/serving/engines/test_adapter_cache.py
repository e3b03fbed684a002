"""Tests an engine's adapter cache: loading, eviction, and the errors of waiting requests."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.admission.errors import EngineUnavailableError, QueueTimeoutError
from serving.engines.adapter_cache import AdapterCache, Checked, LoadedAdapter
from svc.errors import EngineError, NotFoundError
from svc.version import VersionId


def version(number: int) -> VersionId:
    return VersionId("tuned", number)


class Shelf:
    """An engine with adapters that checks the rules of the cache.

    Attributes:
        holds: loaded versions, keyed by the name under which they are loaded.
        failing: versions that fail to load.
        unknown: versions that do not exist.
        stuck: how many of the next unloads fail.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.holds: dict[str, VersionId] = {}
        self.names: list[str] = []
        self.loads: Counter[VersionId] = Counter()
        self.failing: set[VersionId] = set()
        self.unknown: set[VersionId] = set()
        self.stuck = 0
        self.users: Counter[str] = Counter()
        self.gate: asyncio.Event | None = None

    async def check(self, version: VersionId) -> None:
        if version in self.unknown:
            raise NotFoundError(f"there is no {version}")

    async def load(self, version: VersionId, name: str) -> Checked:
        assert name not in self.names, "a name was used again"
        self.names.append(name)
        self.loads[version] += 1
        self.holds[name] = version
        assert len(self.holds) <= self.most, "more are loaded than may be"
        await (self.gate.wait() if self.gate else asyncio.sleep(0))
        if version in self.failing:
            raise EngineError("no adapter")
        return Checked("passed")

    async def unload(self, name: str) -> None:
        assert not self.users[name], "one in use was unloaded"
        await asyncio.sleep(0)
        if self.stuck:
            self.stuck -= 1
            raise EngineError("busy")
        self.holds.pop(name, None)

    @asynccontextmanager
    async def using(
        self, cache: AdapterCache, number: int, *, for_operator: bool = False
    ) -> AsyncIterator[LoadedAdapter]:
        async with cache.use(version(number), for_operator=for_operator) as loaded:
            assert self.holds.get(loaded.name) == version(number), "not what was asked for"
            self.users[loaded.name] += 1
            try:
                yield loaded
            finally:
                assert self.holds.get(loaded.name) == version(number), "it went while it was used"
                self.users[loaded.name] -= 1


def cache_of(shelf: Shelf, **arguments: Any) -> AdapterCache:
    return AdapterCache(shelf, **{"max_loaded": shelf.most, "patience_s": 5.0} | arguments)


async def use(shelf: Shelf, cache: AdapterCache, number: int, turns: int = 1, *, for_operator: bool = False) -> str:
    async with shelf.using(cache, number, for_operator=for_operator) as loaded:
        for _ in range(turns):
            await asyncio.sleep(0)
    return loaded.name


async def turns(condition: Callable[[], object]) -> None:
    """Let the event loop run until a condition holds."""
    async with asyncio.timeout(2):
        while not condition():
            await asyncio.sleep(0)


async def test_adapter_is_loaded_only_on_first_use() -> None:
    shelf = Shelf(2)
    cache = cache_of(shelf)
    names = {await use(shelf, cache, 1) for _ in range(3)}
    assert (len(names), shelf.loads[version(1)]) == (1, 1)
    assert [loaded.version for loaded in cache.loaded] == [version(1)]


async def test_adapter_needed_by_fifty_requests_is_loaded_once() -> None:
    shelf = Shelf(2)
    cache = cache_of(shelf)
    names = await asyncio.gather(*(use(shelf, cache, 1) for _ in range(50)))
    assert (len(set(names)), shelf.loads[version(1)]) == (1, 1)


async def test_least_recently_used_adapter_is_evicted() -> None:
    shelf = Shelf(2)
    cache = cache_of(shelf)
    for number in (1, 2, 1, 3):
        await use(shelf, cache, number)
    assert [loaded.version for loaded in cache.loaded] == [version(1), version(3)]


async def test_hundreds_of_adapters_are_served_with_few_slots() -> None:
    shelf = Shelf(4)
    cache = cache_of(shelf)
    for number in range(1, 201):
        await use(shelf, cache, number)
    assert (len(shelf.names), len(shelf.holds)) == (200, 4)


async def test_reloaded_adapter_gets_a_different_name() -> None:
    shelf = Shelf(1)
    cache = cache_of(shelf)
    first, _, again = [await use(shelf, cache, number) for number in (1, 2, 1)]
    assert first != again and first.startswith("tuned@1#")


async def test_adapter_names_are_not_reused_after_a_server_restart() -> None:
    first, second = Shelf(1), Shelf(1)
    assert await use(first, cache_of(first), 1) != await use(second, cache_of(second), 1)


async def test_request_waits_for_the_first_free_slot_if_all_loaded_adapters_are_in_use() -> None:
    shelf = Shelf(1)
    cache = cache_of(shelf)
    async with shelf.using(cache, 1):
        waiting = asyncio.create_task(use(shelf, cache, 2))
        await asyncio.sleep(0.01)
        assert not waiting.done()
    await waiting


async def test_heavily_used_adapter_does_not_prevent_other_adapters_from_loading() -> None:
    shelf = Shelf(1)
    cache = cache_of(shelf)
    going = True

    async def ask_on() -> None:
        while going:
            await use(shelf, cache, 1, turns=3)

    popular = [asyncio.create_task(ask_on()) for _ in range(4)]
    await turns(lambda: shelf.users.total() == 4)
    async with asyncio.timeout(2):
        await use(shelf, cache, 2)
    going = False
    await asyncio.gather(*popular)


async def test_production_version_accepts_requests_while_other_versions_wait_for_a_slot() -> None:
    shelf = Shelf(2)
    cache = cache_of(shelf)
    async with shelf.using(cache, 1, for_operator=True), shelf.using(cache, 2):
        waiting = [asyncio.create_task(use(shelf, cache, number)) for number in (3, 4)]
        await turns(lambda: len(cache._waiting) == 2)
        assert (cache.is_ready(version(1)), cache.is_ready(version(1), for_operator=True)) == (False, True)
        await use(shelf, cache, 1, for_operator=True)
        taken = cache.take(version(1), for_operator=True)
        assert taken and cache.take(version(2)) is None
        taken.leave()
    await asyncio.gather(*waiting)


async def test_evicted_production_version_is_loaded_before_waiting_versions() -> None:
    shelf = Shelf(2)
    cache = cache_of(shelf)
    async with shelf.using(cache, 2), shelf.using(cache, 3):
        waiting = [asyncio.create_task(use(shelf, cache, number)) for number in (4, 5)]
        await turns(lambda: len(cache._waiting) == 2)
        waiting.append(asyncio.create_task(use(shelf, cache, 1, for_operator=True)))
        await turns(lambda: len(cache._waiting) == 3)
    await asyncio.gather(*waiting)
    assert shelf.names[2].startswith("tuned@1#")


@pytest.mark.parametrize("most", [1, 2])
async def test_non_production_version_gets_a_slot_even_if_production_is_always_in_use(most: int) -> None:
    shelf = Shelf(most)
    cache = cache_of(shelf)
    going = True

    async def ask_on() -> None:
        while going:
            await use(shelf, cache, 1, turns=3, for_operator=True)

    popular = [asyncio.create_task(ask_on()) for _ in range(4)]
    await turns(lambda: shelf.users.total() == 4)
    async with asyncio.timeout(2):
        await use(shelf, cache, 2)
        await use(shelf, cache, 3)
    going = False
    await asyncio.gather(*popular)


async def test_taking_an_adapter_from_the_cache_returns_none_if_it_is_not_loaded() -> None:
    shelf = Shelf(1)
    shelf.gate = asyncio.Event()
    cache = cache_of(shelf)
    first = asyncio.create_task(use(shelf, cache, 1))
    await turns(lambda: shelf.names)
    assert (cache.take(version(1)), cache.take(version(2))) == (None, None)
    shelf.gate.set()
    await first
    taken = cache.take(version(1))
    assert taken and taken.adapter.version == version(1)
    taken.leave()


async def test_request_times_out_if_no_adapter_slot_becomes_free() -> None:
    shelf = Shelf(1)
    cache = cache_of(shelf, patience_s=0.02)
    async with shelf.using(cache, 1):
        with pytest.raises(QueueTimeoutError, match=r"waiting 0.02 s for a slot for the adapter of tuned@2"):
            await use(shelf, cache, 2)
        await use(shelf, cache, 1)  # accepts requests again: no request waits any more


async def test_failed_load_raises_in_all_waiting_requests_and_is_not_cached() -> None:
    shelf = Shelf(2)
    cache = cache_of(shelf)
    shelf.failing = {version(1)}
    results = await asyncio.gather(*(use(shelf, cache, 1) for _ in range(5)), return_exceptions=True)
    assert all(isinstance(error, EngineError) for error in results)
    assert (shelf.loads[version(1)], shelf.holds, cache.loaded) == (1, {}, [])
    shelf.failing.clear()
    await use(shelf, cache, 1)
    assert shelf.loads[version(1)] == 2


async def test_unknown_version_does_not_occupy_an_adapter_slot() -> None:
    shelf = Shelf(1)
    cache = cache_of(shelf)
    await use(shelf, cache, 1)
    shelf.unknown = {version(2)}
    with pytest.raises(NotFoundError):
        await use(shelf, cache, 2)
    assert cache.has(version(1))


async def test_adapter_load_continues_if_the_request_that_started_it_is_cancelled() -> None:
    shelf = Shelf(1)
    shelf.gate = asyncio.Event()
    cache = cache_of(shelf)
    first = asyncio.create_task(use(shelf, cache, 1))
    await turns(lambda: shelf.names)
    first.cancel()
    await asyncio.wait({first})
    second = asyncio.create_task(use(shelf, cache, 1))
    shelf.gate.set()
    await second
    assert shelf.loads[version(1)] == 1


async def test_failed_unload_blocks_other_loads_until_it_succeeds() -> None:
    shelf = Shelf(1)
    cache = cache_of(shelf)
    await use(shelf, cache, 1)
    shelf.stuck = 1
    with pytest.raises(EngineError, match="busy"):
        await use(shelf, cache, 2)
    await use(shelf, cache, 2)
    assert list(shelf.holds.values()) == [version(2)]


async def test_requests_waiting_for_an_adapter_fail_when_the_engine_stops() -> None:
    shelf = Shelf(1)
    shelf.gate = asyncio.Event()
    cache = cache_of(shelf)
    asking = [asyncio.create_task(use(shelf, cache, number)) for number in (1, 1, 2)]
    await turns(lambda: shelf.names)
    cache.close()
    results = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(error) for error in results] == [EngineUnavailableError] * 3
    with pytest.raises(EngineUnavailableError):
        await use(shelf, cache, 1)
    assert cache.loaded == []


async def test_unused_adapter_is_evicted_immediately_when_its_version_is_removed() -> None:
    shelf, reports = Shelf(2), list[float | None]()
    cache = cache_of(shelf, on_change=reports.append)
    await use(shelf, cache, 1)
    await asyncio.sleep(0)
    cache.drop(version(1))
    assert (cache.loaded, cache.has(version(1)), reports[-1]) == ([], False, None)
    await turns(lambda: not shelf.holds)


async def test_adapter_in_use_stays_loaded_when_its_version_is_removed() -> None:
    shelf = Shelf(1)
    cache = cache_of(shelf)
    async with shelf.using(cache, 1):
        cache.drop(version(1))
        assert cache.loaded == []
        waiting = asyncio.create_task(use(shelf, cache, 2))
        await asyncio.sleep(0.01)
        assert list(shelf.holds.values()) == [version(1)]
    await waiting
    assert list(shelf.holds.values()) == [version(2)]


async def test_new_requests_for_a_removed_version_fail_even_while_its_adapter_is_in_use() -> None:
    shelf = Shelf(1)
    cache = cache_of(shelf)
    async with shelf.using(cache, 1):
        cache.drop(version(1))
        shelf.unknown = {version(1)}
        with pytest.raises(NotFoundError):
            await use(shelf, cache, 1)


async def test_adapter_keeps_serving_if_its_removal_is_cancelled() -> None:
    shelf = Shelf(2)
    cache = cache_of(shelf)
    async with shelf.using(cache, 1) as before:
        cache.drop(version(1))
        assert await use(shelf, cache, 1) == before.name
        assert cache.has(version(1))
    assert [loaded.version for loaded in cache.loaded] == [version(1)]


async def test_dropping_an_adapter_that_is_not_loaded_does_nothing() -> None:
    shelf = Shelf(1)
    cache = cache_of(shelf)
    await use(shelf, cache, 1)
    cache.drop(version(2))
    assert cache.has(version(1))


async def test_adapter_loads_and_evictions_are_reported() -> None:
    shelf, reports = Shelf(1), list[float | None]()
    cache = cache_of(shelf, on_change=reports.append)
    for number in (1, 2):
        await use(shelf, cache, number)
    await asyncio.sleep(0)
    assert [seconds is None for seconds in reports] == [False, True, False]


@pytest.mark.slow
@settings(max_examples=3 * settings().max_examples, deadline=None)
@given(
    most=st.integers(1, 4),
    asked=st.lists(
        st.tuples(st.integers(1, 6), st.integers(0, 6), st.integers(0, 8), st.booleans(), st.booleans()), max_size=40
    ),
    failing=st.sets(st.integers(1, 6), max_size=2),
    dropped=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 12)), max_size=6),
    stuck=st.integers(0, 2),
)
def test_adapter_cache_respects_limits_and_serves_the_right_adapter_for_any_request_order(
    most: int,
    asked: list[tuple[int, int, int, bool, bool]],
    failing: set[int],
    dropped: list[tuple[int, int]],
    stuck: int,
) -> None:
    """The double checks the slot limit, adapters in use, unique names, and which adapter answers."""

    async def run() -> None:
        shelf = Shelf(most)
        shelf.failing, shelf.stuck = {version(number) for number in failing}, stuck
        cache = cache_of(shelf, patience_s=30.0)

        async def ask(number: int, before: int, during: int, leaves: bool, for_operator: bool) -> None:
            for _ in range(before):
                await asyncio.sleep(0)
            asking = asyncio.create_task(use(shelf, cache, number, turns=during, for_operator=for_operator))
            if leaves:
                for _ in range(during):
                    await asyncio.sleep(0)
                asking.cancel()
            with suppress(EngineError, asyncio.CancelledError):
                await asking

        async def drop(number: int, before: int) -> None:
            for _ in range(before):
                await asyncio.sleep(0)
            cache.drop(version(number))

        async with asyncio.timeout(10):
            await asyncio.gather(
                *(ask(*arguments) for arguments in asked), *(drop(*arguments) for arguments in dropped)
            )
            await turns(lambda: not cache._tasks)
        assert not cache._waiting and all(not slot.users for slot in cache._slots.values())
        assert not any(slot.closing or slot.dropped for slot in cache._slots.values())

    asyncio.run(run())
