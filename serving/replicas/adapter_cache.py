"""The adapters that one engine has loaded: one that is asked for comes, and the least recently used one goes.

An adapter is loaded at its first use, once for all who ask for it meanwhile. One that a request uses stays. Where all
are in use, the requests for one that is not loaded wait in their order, and the least recently used ones, as many as
adapters are waited for, take no new requests until they were replaced: nobody waits for longer than what runs takes.

A name in the engine is used once: its prefix cache knows an adapter by its name. Knows neither HTTP nor what a version
is made of.
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
    """What the verification of a loaded adapter found.

    Attributes:
        found: for the journal.
        verified: whether there was anything to compare with.
    """

    found: str
    verified: bool = True


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """One that requests may use.

    Attributes:
        name: what the engine calls it.
    """

    version: VersionId
    name: str
    checked: Checked


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """A loaded adapter that stays loaded for one request.

    Attributes:
        leave: to be called once, when the request has ended.
    """

    adapter: LoadedAdapter
    leave: Callable[[], None]


class AdapterLoader(Protocol):
    """How an adapter comes into the engine."""

    async def check(self, version: VersionId) -> None:
        """Raises where a version has no adapter that clients may ask this engine for; before anything makes room."""

    async def load(self, version: VersionId, name: str) -> Checked:
        """Loads it under a name and verifies it; raises where either fails."""

    async def unload(self, name: str) -> None:
        """Removes it; it need not be there."""


def _future() -> "asyncio.Future[LoadedAdapter]":
    future: asyncio.Future[LoadedAdapter] = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may have waited for it
    return future


@dataclass(slots=True, eq=False)
class _Slot:
    """One adapter's place.

    Attributes:
        users: requests that use it, or will when it is loaded; the load itself is one.
        closing: takes no new requests, because another adapter is waited for.
        dropped: its version was removed; it goes when no request uses it.
    """

    version: VersionId
    name: str
    users: int = 1
    closing: bool = False
    dropped: bool = False
    loaded: "asyncio.Future[LoadedAdapter]" = field(default_factory=_future)


@dataclass(slots=True, eq=False)
class _Wait:
    """Requests that wait for an adapter's place.

    Attributes:
        given: the place, in which they are counted already.
    """

    count: int = 0
    given: "asyncio.Future[_Slot]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class AdapterCache:
    """The adapters of one engine, from its start to its end.

    Args:
        max_loaded: most at once.
        patience_s: longest wait of a request for a place, seconds.
        on_change: hears when one has come, with the seconds that it took, or has gone, with None.
    """

    def __init__(
        self,
        loader: AdapterLoader,
        *,
        max_loaded: int,
        patience_s: float,
        on_change: Callable[[float | None], None] = lambda seconds: None,
    ) -> None:
        self._loader = loader
        self._max_loaded = max_loaded
        self._patience_s = patience_s
        self._on_change = on_change
        self._slots: dict[VersionId, _Slot] = {}  # the least recently used one first
        self._waiting: OrderedDict[VersionId, _Wait] = OrderedDict()
        self._to_unload: list[str] = []
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def loaded(self) -> list[LoadedAdapter]:
        """Those that requests may use now, the least recently used one first; may be asked in another thread."""
        done = [slot.loaded for slot in list(self._slots.values()) if slot.loaded.done() and not slot.dropped]
        return [loaded.result() for loaded in done if not loaded.exception()]

    def has(self, version: VersionId) -> bool:
        """Whether it is loaded, or is being loaded."""
        slot = self._slots.get(version)
        return slot is not None and not slot.dropped

    def is_ready(self, version: VersionId, *, for_operator: bool = False) -> bool:
        """Whether it is loaded and takes requests.

        Args:
            for_operator: see `bring`.
        """
        slot = self._slots.get(version)
        if slot is None or slot.dropped or not self._takes(slot, for_operator) or not slot.loaded.done():
            return False
        return slot.loaded.exception() is None

    def take(self, version: VersionId, *, for_operator: bool = False) -> AdapterUse | None:
        """Return the use of an adapter that is ready; None where one would have to wait for it."""
        if not self.is_ready(version, for_operator=for_operator):
            return None
        slot = self._slots[version]
        slot.users += 1
        self._used(slot)
        return AdapterUse(slot.loaded.result(), partial(self._leave, slot))

    async def bring(self, version: VersionId, *, for_operator: bool = False) -> AdapterUse:
        """Return the use of an adapter; loaded first where it must be.

        Args:
            for_operator: the operator wants the version served: the loader is not asked whether clients may have it.
                Where several are loaded, it takes requests also while others are waited for, and comes before those.

        Raises:
            QueueTimeoutError: all that are loaded were in use for too long.
            EngineUnavailableError: the engine ended meanwhile.
            Exception: what the loader raises.
        """
        if not for_operator and not self.has(version):
            await self._loader.check(version)
        slot = await self._occupy(version, for_operator)
        try:
            return AdapterUse(await asyncio.shield(slot.loaded), partial(self._leave, slot))
        except BaseException:
            self._leave(slot)
            raise

    @asynccontextmanager
    async def use(self, version: VersionId, *, for_operator: bool = False) -> AsyncIterator[LoadedAdapter]:
        """A loaded adapter for the body; see `bring`."""
        use = await self.bring(version, for_operator=for_operator)
        try:
            yield use.adapter
        finally:
            use.leave()

    def drop(self, version: VersionId) -> None:
        """A version was removed: whoever asks for it is checked again, and it goes when no request uses it."""
        slot = self._slots.get(version)
        if slot is not None:
            slot.dropped = True
            self._give_places()
            self._on_change(None)

    def close(self) -> None:
        """The engine ends: whoever waits hears it, and nothing is loaded any more."""
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
        self._on_change(None)

    def _takes(self, slot: _Slot, for_operator: bool) -> bool:
        return not slot.closing or (for_operator and self._max_loaded > 1)

    async def _occupy(self, version: VersionId, for_operator: bool) -> _Slot:
        """The version's place, when there is one for it; whoever gets it must leave it."""
        if self._closed:
            raise _ended()
        slot = self._slots.get(version)
        if slot is not None and self._takes(slot, for_operator):
            slot.dropped = False  # who comes here was checked: its removal was given up
            slot.users += 1
            self._used(slot)
            return slot
        wait = self._waiting.setdefault(version, _Wait())
        wait.count += 1
        if for_operator and self._max_loaded > 1:
            self._waiting.move_to_end(version, last=False)
        self._give_places()
        try:
            async with asyncio.timeout(self._patience_s):
                return await asyncio.shield(wait.given)
        except BaseException as error:
            self._give_up(version, wait)
            if isinstance(error, TimeoutError):
                raise QueueTimeoutError(
                    f"waited {self._patience_s:g} s for a place for the adapter of {version}: all are in use",
                    todo="send the request again",
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
        """Gives places to the versions that were asked for first; makes the others' come free."""
        for gone in [slot for slot in self._slots.values() if slot.dropped and not slot.users]:
            self._evict(gone)
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
        """A place for a version, whose load begins; None where all are in use."""
        if len(self._slots) >= self._max_loaded:
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
        self._on_change(None)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self, slot: _Slot) -> None:
        """Loads it, one at a time; not cut off where nobody waits for it any more, since another one may come."""
        try:
            async with self._turn:
                checked = await self._loaded(slot)
        except Exception as error:  # noqa: BLE001 - whatever it is, those hear it who wait
            if self._slots.get(slot.version) is slot:
                del self._slots[slot.version]
            if not slot.loaded.done():
                slot.loaded.set_exception(error)
        else:
            if not slot.loaded.done():
                slot.loaded.set_result(LoadedAdapter(slot.version, slot.name, checked))
        self._leave(slot)

    async def _loaded(self, slot: _Slot) -> Checked:
        await self._unload()  # before: there are never more than may be
        began = time.monotonic()
        try:
            checked = await self._loader.load(slot.version, slot.name)
        except Exception:
            self._to_unload.append(slot.name)  # it may be there, or not
            with suppress(Exception):  # then the next load does it
                await self._unload()
            raise
        # Told a turn of the loop later, when it can be used.
        asyncio.get_running_loop().call_soon(self._on_change, time.monotonic() - began)
        return checked

    async def _unload_now(self) -> None:
        async with self._turn:
            with suppress(Exception):  # then the next load does it
                await self._unload()

    async def _unload(self) -> None:
        """Removes what has lost its place; what the engine does not let go is tried again at the next load."""
        while self._to_unload:
            await self._loader.unload(self._to_unload[0])
            del self._to_unload[0]


def _ended() -> EngineUnavailableError:
    return EngineUnavailableError("the engine ended", todo="send the request again later")
