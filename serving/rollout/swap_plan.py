"""Plans a swap, running every check that is possible before an engine is changed."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from serving.engines.pool import EnginePool
from serving.engines.verification import Verification
from svc.errors import RefusedError
from svc.registry.fingerprint import compatibility_fingerprint
from svc.settings.serve import SwapChoice
from svc.store.swaps import SwapKind
from svc.version import Format, Target

Report = Callable[[str], None]

_ROOM_POLL_S = 1.0
_SAME = "architecture, quantization, tokenizer and template are the same"
_ONE_AFTER_THE_OTHER = "the version can be reloaded in place, one engine after the other"
_DIFFERENT = "architecture, shapes, tokenizer, template or format differ"
_NO_RELOAD = "engines of this kind do not reload the version correctly in place"
_UNPROBED = "the engine's weights could not be verified after a reload"
_AS_SET = "set by `serve.swap`"
_FIRST_LOAD = (
    "there are no probes from this kind of engine yet; they are recorded only on an engine that starts with the version"
)


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan for changing the engines to another version.

    Attributes:
        why: reason for choosing this kind of swap.
        restart: whether an in-place swap restarts the first engine with the new version instead of reloading
            it.
        reloads: whether the other engines are reloaded after that restart. If not, they are restarted too.
    """

    kind: SwapKind
    why: str
    restart: bool = False
    reloads: bool = True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SwapPlanner:
    """Chooses the kind of swap for a version change.

    Attributes:
        choice: setting that determines whether to start a second engine even if an in-place reload is possible.
        patience_s: longest wait, in seconds, until engines that are stopping have freed their memory and engines that
            are starting have allocated theirs.
    """

    verification: Verification
    pool: EnginePool
    choice: SwapChoice
    patience_s: float

    async def plan(self, current: Target, target: Target, report: Report) -> Plan:
        """Plan a swap after comparing the two versions and checking their files.

        All checks are run before the swap, because a failed reload kills the engine.

        Args:
            current: version that the engines run.
            report: function called with a description of each step.

        Raises:
            NotFoundError, IntegrityError: the version's files are missing or damaged.
            RefusedError: the version cannot be served as an adapter.
            EngineError: the format cannot be served on this machine.
            OSError, SQLAlchemyError: the files or the store cannot be read.
        """
        await self.verification.files(target)
        report("the files match the manifest")
        if Format.ADAPTER in (current.format, target.format):
            plan = await self._with_adapter(current, target)
        elif not await asyncio.to_thread(self._fits, current, target):
            plan = Plan(SwapKind.BLUEGREEN, _DIFFERENT)
        elif self.choice is SwapChoice.BLUEGREEN:
            plan = Plan(SwapKind.BLUEGREEN, _AS_SET)
        else:
            plan = await self._in_place(target)
        report(f"{plan.kind} swap: {plan.why}")
        return plan

    async def _with_adapter(self, current: Target, target: Target) -> Plan:
        """Plan a swap to or from an adapter. If all running engines can apply the adapter, it is loaded into them."""
        await self.verification.model(target)
        if current.format is not target.format:
            return Plan(SwapKind.BLUEGREEN, _DIFFERENT)
        if self.choice is SwapChoice.BLUEGREEN:
            return Plan(SwapKind.BLUEGREEN, _AS_SET)
        try:
            for model in [engine.model for engine in self.pool.alive if engine.model]:
                await self.verification.adapter(target.version, model)
        except RefusedError as error:
            return Plan(SwapKind.BLUEGREEN, error.wrong)
        return Plan(SwapKind.ADAPTER, "an adapter of the same base")

    async def _in_place(self, target: Target) -> Plan:
        """Plan an in-place reload if an engine for the new version supports it and can verify the loaded weights.

        Otherwise, plan to start a second engine with that version or, if there is not enough memory for it, to restart
        the running engine with that version.
        """
        several = len(self.pool.alive) > 1
        kind = SwapKind.ROLLING if several else SwapKind.INPLACE
        able = await asyncio.to_thread(self.pool.slots.capabilities, target)
        if not able.reloads:
            why, reloads = _NO_RELOAD, False
        elif able.unprobed:
            why, reloads = f"{_UNPROBED}: {able.unprobed}", False
        elif not await self.verification.has_probes(target):
            why, reloads = _FIRST_LOAD, True
        else:
            return Plan(kind, _ONE_AFTER_THE_OTHER if several else _SAME)
        shortage = await self.shortage(target)
        if not shortage:
            return Plan(SwapKind.BLUEGREEN, why)
        return Plan(kind, f"{why}; not enough memory for a second engine: {shortage}", restart=True, reloads=reloads)

    def _fits(self, current: Target, target: Target) -> bool:
        """Return whether two versions have equal fingerprints, in which case weights can be reloaded in place.

        Stored fingerprints are compared first. Computing them parses both tokenizers, which blocks the interpreter,
        and with it every stream, for 100 ms or more. It is therefore done only if the stored fingerprints are
        missing or differ, as they may between releases.
        """
        stored = [self.verification.registry.format(of.version, of.format).fingerprint for of in (current, target)]
        if stored[0] and stored[0] == stored[1]:
            return True
        folders = (self.verification.registry.artifact(of.version, of.format) for of in (current, target))
        computed = [compatibility_fingerprint(folder) for folder in folders]
        return computed[0] == computed[1]

    async def shortage(self, target: Target) -> str | None:
        """Return a message stating which resources are insufficient for one more engine, or None if there are enough.

        Before reporting a shortage, wait up to `patience_s` for other engines to finish stopping or starting.
        """
        deadline = time.monotonic() + self.patience_s
        while True:
            starting = self.pool.starting
            shortage = await self.pool.slots.shortage({target: 1 + starting})
            if not shortage or not (self.pool.retirement.under_way or starting) or time.monotonic() >= deadline:
                return shortage
            await asyncio.sleep(_ROOM_POLL_S)
