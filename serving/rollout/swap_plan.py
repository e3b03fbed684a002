"""What a swap will do, and everything that can be found wrong with it, before an engine is touched."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from serving.replicas.pool import EnginePool
from serving.replicas.slots import EngineSlots
from serving.replicas.verification import Verification
from svc.errors import RefusedError
from svc.registry.fingerprint import compatibility_fingerprint
from svc.registry.registry import Registry
from svc.settings import SwapChoice
from svc.store.swaps import SwapKind
from svc.version import Format, Target

Report = Callable[[str], None]

_ROOM_POLL_S = 1.0
_SAME = "same architecture, quantization, tokenizer and template"
_ONE_AFTER_THE_OTHER = "it fits in place, one engine after the other"
_DIFFERENT = "architecture, shapes, tokenizer, template or format differ"
_NO_RELOAD = "engines of this kind do not load it rightly in place"
_UNPROBED = "nothing could tell what it holds after a reload"
_FIRST_LOAD = "it has no probes of this kind of engine yet, which only an engine that starts with it can give"


@dataclass(frozen=True, slots=True)
class Plan:
    """How a version comes into the engines.

    Attributes:
        why: it is of this kind.
        restart: in place the first engine is started again with the version, and not reloaded.
        reloads: the others are reloaded then.
    """

    kind: SwapKind
    why: str
    restart: bool = False
    reloads: bool = True


class SwapPlanner:
    """Decides which swap it is.

    Args:
        choice: whether a second engine is started where a reload in place would do.
        slots: knows whether there is memory for an engine more, and what it could do.
        patience_s: how long engines that end may take to make room, and those that start to take theirs, seconds.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        verification: Verification,
        pool: EnginePool,
        choice: SwapChoice,
        slots: EngineSlots,
        patience_s: float,
    ) -> None:
        self._registry = registry
        self._verification = verification
        self._pool = pool
        self._choice = choice
        self._slots = slots
        self._patience_s = patience_s

    async def plan(self, current: Target, target: Target, report: Report) -> Plan:
        """Compares files and versions. A reload that fails ends the engine, so nothing is left to it.

        Args:
            current: what the engines hold.
            report: hears each step.

        Raises:
            NotFoundError, IntegrityError: the version's files are not there or not right.
            RefusedError: it cannot be served as an adapter.
            EngineError: the format cannot be served here.
            OSError, SQLAlchemyError: files or store cannot be read.
        """
        await self._verification.files(target)
        report("files match the manifest")
        if Format.ADAPTER in (current.format, target.format):
            plan = await self._with_adapter(current, target)
        elif not await asyncio.to_thread(self._fits, current, target):
            plan = Plan(SwapKind.BLUEGREEN, _DIFFERENT)
        elif self._choice is SwapChoice.BLUEGREEN:
            plan = Plan(SwapKind.BLUEGREEN, "as set")
        else:
            plan = await self._in_place(target)
        report(f"{plan.kind} swap: {plan.why}")
        return plan

    async def _with_adapter(self, current: Target, target: Target) -> Plan:
        """An adapter comes beside the base that the engines hold, where it fits every one of them."""
        await self._verification.model(target)
        if current.format is not target.format:
            return Plan(SwapKind.BLUEGREEN, _DIFFERENT)
        if self._choice is SwapChoice.BLUEGREEN:
            return Plan(SwapKind.BLUEGREEN, "as set")
        try:
            for model in [engine.model for engine in self._pool.alive if engine.model]:
                await self._verification.adapter(target.version, model)
        except RefusedError as error:
            return Plan(SwapKind.BLUEGREEN, error.wrong)
        return Plan(SwapKind.ADAPTER, "an adapter of the same base")

    async def _in_place(self, target: Target) -> Plan:
        """Plan a reload where engines of this kind can do it and verify it.

        Otherwise an engine starts with the version: a second one, or, without memory for it, the same one again.
        """
        several = len(self._pool.alive) > 1
        kind = SwapKind.ROLLING if several else SwapKind.INPLACE
        able = await asyncio.to_thread(self._slots.capabilities, target)
        if not able.reloads:
            why, reloads = _NO_RELOAD, False
        elif able.unprobed:
            why, reloads = f"{_UNPROBED}: {able.unprobed}", False
        elif not await self._verification.has_probes(target):
            why, reloads = _FIRST_LOAD, True
        else:
            return Plan(kind, _ONE_AFTER_THE_OTHER if several else _SAME)
        shortage = await self.shortage(target)
        if not shortage:
            return Plan(SwapKind.BLUEGREEN, why)
        return Plan(kind, f"{why}; no room for a second engine: {shortage}", restart=True, reloads=reloads)

    def _fits(self, current: Target, target: Target) -> bool:
        """Compares the fingerprints that were taken when the versions were made; their files were compared since.

        Taking them again parses both tokenizers, which holds the interpreter, and with it every stream, for 100 ms or
        more: that is for versions that have none, or one that another release took.
        """
        one, other = (self._registry.format(of.version, of.format).fingerprint for of in (current, target))
        if one and one == other:
            return True
        folders = (self._registry.artifact(of.version, of.format) for of in (current, target))
        one, other = (compatibility_fingerprint(folder) for folder in folders)
        return one == other

    async def shortage(self, target: Target) -> str | None:
        """Why there is no room for one more, after engines that end, or that a dead member gets, had some time."""
        deadline = time.monotonic() + self._patience_s
        while True:
            starting = self._pool.starting
            shortage = await asyncio.to_thread(self._slots.shortage, {target: 1 + starting})
            if not shortage or not (self._pool.retirement.under_way or starting) or time.monotonic() >= deadline:
                return shortage
            await asyncio.sleep(_ROOM_POLL_S)
