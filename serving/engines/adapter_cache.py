"""Cache of the adapters loaded in one engine.

Adapters are loaded on demand. When the cache is full, the least recently used adapter is evicted.

An adapter is loaded on its first use, once for all requests that need it. An adapter in use is not evicted.
If all loaded adapters are in use, requests for other adapters wait in order. For each adapter that has
waiting requests, one loaded adapter (the least recently used) stops accepting requests until it is
replaced. A request therefore never waits longer than the running requests take to finish.

Adapter names in the engine are never reused, because the prefix cache identifies an adapter by its name.
This module does not depend on HTTP or on the contents of a version.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol
from uuid import uuid4

from serving.admission.errors import EngineUnavailableError, QueueTimeoutError
from svc.version import VersionId


@dataclass(frozen=True, slots=True)
class Checked:
    """Result of verifying a loaded adapter.

    Attributes:
        found: description of the result, for the journal.
        verified: False if the adapter could not be verified because there was nothing to compare it with.
    """

    found: str
    verified: bool = True


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """A loaded adapter that requests may use.

    Attributes:
        name: the adapter's name in the engine.
    """

    version: VersionId
    name: str
    checked: Checked


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """A request's claim on a loaded adapter, which keeps the adapter from being evicted.

    Attributes:
        leave: function that must be called once, when the request ends.
    """

    adapter: LoadedAdapter
    leave: Callable[[], None]


class AdapterLoader(Protocol):
    """Loads and unloads an engine's adapters."""

    async def check(self, version: VersionId) -> None:
        """Raise an error unless the version has an adapter that clients may use in this engine.

        This is called before any eviction.
        """

    async def load(self, version: VersionId, name: str) -> Checked:
        """Load an adapter under the given name and verify it. Raise an error if either step fails."""

    async def unload(self, name: str) -> None:
        """Unload an adapter, or do nothing if it is not loaded."""


def _future() -> "asyncio.Future[LoadedAdapter]":
    future: asyncio.Future[LoadedAdapter] = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())  # there may be no waiter
    return future


@dataclass(slots=True, eq=False)
class _Slot:
    """One of the engine's adapter slots, which holds one adapter.

    Attributes:
        users: number of requests that use the adapter or wait for it to load. A load in progress also counts as a user.
        closing: whether the slot accepts no new requests, because requests are waiting for another adapter.
        dropped: whether the version was removed. The adapter is then evicted when no request uses it.
    """

    version: VersionId
    name: str
    users: int = 1
    closing: bool = False
    dropped: bool = False
    loaded: "asyncio.Future[LoadedAdapter]" = field(default_factory=_future)


@dataclass(slots=True, eq=False)
class _Wait:
    """The requests that are waiting for the same adapter to get a slot.

    Attributes:
        given: future that resolves to the slot. By then, the waiting requests are counted in the slot's
            `users`.
    """

    count: int = 0
    given: "asyncio.Future[_Slot]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(eq=False)
class AdapterCache:
    """Cache of the adapters loaded in one engine. It is discarded when the engine stops.

    Attributes:
        max_loaded: maximum number of loaded adapters.
        patience_s: longest time that a request may wait for a slot, in seconds.
        on_change: function called after a load with its duration in seconds, and after an eviction with
            None.
    """

    loader: AdapterLoader
    max_loaded: int
    patience_s: float
    on_change: Callable[[float | None], None] = lambda seconds: None

    def __post_init__(self) -> None:
        self._slots: dict[VersionId, _Slot] = {}  # the least recently used one first
        self._waiting: OrderedDict[VersionId, _Wait] = OrderedDict()
        self._to_unload: list[str] = []
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def loaded(self) -> list[LoadedAdapter]:
        """Adapters that requests can use now, least recently used first. Safe to read from another thread."""
        done = [slot.loaded for slot in list(self._slots.values()) if slot.loaded.done() and not slot.dropped]
        return [loaded.result() for loaded in done if not loaded.exception()]

    def has(self, version: VersionId) -> bool:
        """Return whether a version's adapter is loaded or being loaded."""
        slot = self._slots.get(version)
        return slot is not None and not slot.dropped

    def is_ready(self, version: VersionId, *, for_operator: bool = False) -> bool:
        """Return whether a version's adapter is loaded and accepts requests.

        Args:
            for_operator: as in `acquire`.
        """
        slot = self._slots.get(version)
        if slot is None or slot.dropped or not self._takes(slot, for_operator) or not slot.loaded.done():
            return False
        return slot.loaded.exception() is None

    def take(self, version: VersionId, *, for_operator: bool = False) -> AdapterUse | None:
        """Return a claim on an adapter, or None if the request would have to wait for the adapter."""
        if not self.is_ready(version, for_operator=for_operator):
            return None
        slot = self._slots[version]
        slot.users += 1
        self._used(slot)
        return AdapterUse(slot.loaded.result(), partial(self._leave, slot))

    async def check(self, version: VersionId) -> None:
        """Check that a client's request may load a version's adapter. Raises the loader's error otherwise."""
        if not self.has(version):
            await self.loader.check(version)

    async def acquire(self, version: VersionId, *, for_operator: bool = False) -> AdapterUse:
        """Return a claim on an adapter, loading the adapter first if necessary.

        Args:
            for_operator: whether the operator wants the version to be served. If so, the loader does not check
                whether clients may use it. If the engine has several slots, the adapter is also loaded before other
                waiting adapters, and keeps accepting requests while those adapters wait.

        Raises:
            QueueTimeoutError: all loaded adapters were in use for too long.
            EngineUnavailableError: the engine stopped while the request was waiting.
            Exception: any error raised by the loader.
        """
        if not for_operator:
            await self.check(version)
        slot = await self._occupy(version, for_operator)
        try:
            return AdapterUse(await asyncio.shield(slot.loaded), partial(self._leave, slot))
        except BaseException:
            self._leave(slot)
            raise

    @asynccontextmanager
    async def use(self, version: VersionId, *, for_operator: bool = False) -> AsyncIterator[LoadedAdapter]:
        """Keep an adapter loaded for the duration of the `with` block. See `acquire`."""
        use = await self.acquire(version, for_operator=for_operator)
        try:
            yield use.adapter
        finally:
            use.leave()

    def drop(self, version: VersionId) -> None:
        """Evict a removed version's adapter once no request uses it. Later requests must pass `check` again."""
        slot = self._slots.get(version)
        if slot is not None:
            slot.dropped = True
            self._give_places()
            self.on_change(None)

    def close(self) -> None:
        """Close the cache when the engine stops. Waiting requests fail, and no more adapters are loaded."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        futures: list[asyncio.Future[Any]] = [slot.loaded for slot in self._slots.values()]
        futures += [wait.given for wait in self._waiting.values()]
        for future in futures:
            if not future.done():
                future.set_exception(_ended())
        self._slots.clear()
        self._waiting.clear()
        self.on_change(None)

    def _takes(self, slot: _Slot, for_operator: bool) -> bool:
        return not slot.closing or (for_operator and self.max_loaded > 1)

    async def _occupy(self, version: VersionId, for_operator: bool) -> _Slot:
        """Wait up to `patience_s` for a slot with the version's adapter. The caller must release it with `_leave`."""
        if self._closed:
            raise _ended()
        slot = self._slots.get(version)
        if slot is not None and self._takes(slot, for_operator):
            slot.dropped = False  # the request was checked, so the version exists again
            slot.users += 1
            self._used(slot)
            return slot
        wait = self._waiting.setdefault(version, _Wait())
        wait.count += 1
        if for_operator and self.max_loaded > 1:
            self._waiting.move_to_end(version, last=False)
        self._give_places()
        try:
            async with asyncio.timeout(self.patience_s):
                return await asyncio.shield(wait.given)
        except BaseException as error:
            self._give_up(version, wait)
            if isinstance(error, TimeoutError):
                raise QueueTimeoutError(
                    f"timed out after waiting {self.patience_s:g} s for a slot for the adapter of {version}",
                    todo="retry the request",
                ) from None
            raise

    def _used(self, slot: _Slot) -> None:
        self._slots[slot.version] = self._slots.pop(slot.version)

    def _give_up(self, version: VersionId, wait: _Wait) -> None:
        if not wait.given.done():
            wait.count -= 1
            if not wait.count:
                wait.given.cancel()
                del self._waiting[version]
                self._give_places()
        elif not wait.given.exception():
            self._leave(wait.given.result())

    def _leave(self, slot: _Slot) -> None:
        slot.users -= 1
        self._give_places()

    def _give_places(self) -> None:
        """Assign slots to waiting versions in order. For each version that must keep waiting, stop one slot from
        accepting new requests.
        """
        for unused in [slot for slot in self._slots.values() if slot.dropped and not slot.users]:
            self._evict(unused)
            self._start(self._unload_now())
        while self._waiting:
            version, wait = next(iter(self._waiting.items()))
            slot = self._slots.get(version) or self._new_slot(version)
            if slot is None:
                break
            slot.users += wait.count
            slot.dropped = False
            self._used(slot)
            del self._waiting[version]
            wait.given.set_result(slot)
        for place, slot in enumerate(self._slots.values()):
            slot.closing = place < len(self._waiting)

    def _new_slot(self, version: VersionId) -> _Slot | None:
        """Return a slot for a version and start loading it, or return None if all slots are in use."""
        if len(self._slots) >= self.max_loaded:
            idle = next((slot for slot in self._slots.values() if not slot.users), None)
            if idle is None:
                return None
            self._evict(idle)
        slot = self._slots[version] = _Slot(version, f"{version}#{uuid4().hex}")
        self._start(self._load(slot))
        return slot

    def _evict(self, slot: _Slot) -> None:
        del self._slots[slot.version]
        self._to_unload.append(slot.name)
        self.on_change(None)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self, slot: _Slot) -> None:
        """Load an adapter into its slot. Adapters are loaded one at a time.

        The load continues even if all requests waiting for it are cancelled, because a later request may use the
        adapter.
        """
        try:
            async with self._turn:
                checked = await self._loaded(slot)
        except Exception as error:  # noqa: BLE001 - any error is raised in the waiting requests
            if self._slots.get(slot.version) is slot:
                del self._slots[slot.version]
            if not slot.loaded.done():
                slot.loaded.set_exception(error)
        else:
            if not slot.loaded.done():
                slot.loaded.set_result(LoadedAdapter(slot.version, slot.name, checked))
        self._leave(slot)

    async def _loaded(self, slot: _Slot) -> Checked:
        await self._unload()  # first, so that there are never more than the maximum
        began = time.monotonic()
        try:
            checked = await self.loader.load(slot.version, slot.name)
        except Exception:
            self._to_unload.append(slot.name)  # it may be loaded or not
            with suppress(Exception):  # the next load tries again
                await self._unload()
            raise
        # Called one iteration of the event loop later, when the adapter can be used.
        asyncio.get_running_loop().call_soon(self.on_change, time.monotonic() - began)
        return checked

    async def _unload_now(self) -> None:
        async with self._turn:
            with suppress(Exception):  # the next load tries again
                await self._unload()

    async def _unload(self) -> None:
        """Unload the evicted adapters. If unloading fails, it is retried on the next load."""
        while self._to_unload:
            await self.loader.unload(self._to_unload[0])
            del self._to_unload[0]


def _ended() -> EngineUnavailableError:
    return EngineUnavailableError("the engine stopped", todo="retry the request later")
