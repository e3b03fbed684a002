"""The swap in place: another version in the engine that runs, with no request lost and none answered by two versions.

Check the files -> close the door -> let running requests end -> reload -> forget the prefix cache -> check the
probes -> open. Whatever fails after the reload ends with the version before, proven again, and the door opens only
then. One copy of the weights in memory; no process starts.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from serving.hold import Admission
from serving.proof import Proof
from serving.routing import Routes, Served
from serving.supervisor import Supervisor
from svc.engine.state import EngineState
from svc.errors import EngineError, SvcError, SwapError
from svc.registry.fingerprint import compatibility_fingerprint
from svc.registry.registry import Registry
from svc.store.desired import Target
from svc.store.swaps import SwapOutcome, SwapResult

log = logging.getLogger(__name__)

Report = Callable[[str], None]


class InPlaceSwap:
    """Changes the version in one engine.

    Args:
        drain_timeout_s: longest wait for the requests that run.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        proof: Proof,
        supervisor: Supervisor,
        door: Admission,
        routes: Routes,
        drain_timeout_s: float,
    ) -> None:
        self._registry = registry
        self._proof = proof
        self._supervisor = supervisor
        self._door = door
        self._routes = routes
        self._drain_timeout_s = drain_timeout_s

    async def run(self, current: Target, target: Target, report: Report) -> SwapResult:
        """Swaps, or leaves `current` serving. Raises for nothing that has to do with the two versions.

        Args:
            current: what the engine holds.
            report: hears each step.
        """
        try:
            await self._check(current, target, report)
        except SvcError as error:
            log.warning("%s refused: %s", target, error)
            return SwapResult(SwapOutcome.REFUSED, str(error))
        started = time.monotonic()
        async with self._door.closed():
            running = self._door.running
            report(f"holding new requests, {running} running")
            try:
                outcome, reason = await self._replace(current, target, report)
            finally:
                held, seconds = self._door.held, time.monotonic() - started
        report(f"open again after {seconds:.2f} s, {held} requests were held")
        return SwapResult(outcome, reason, seconds, running, held)

    async def _check(self, current: Target, target: Target, report: Report) -> None:
        """Everything that can be found wrong while the door is open. A reload that fails ends the engine."""
        folder = await self._proof.files(target)
        report("files match the manifest")
        wanted = await asyncio.to_thread(compatibility_fingerprint, folder)
        loaded = self._registry.artifact(current.version, current.format)
        if wanted != await asyncio.to_thread(compatibility_fingerprint, loaded):
            raise SwapError(
                f"{target} does not fit in place of {current}",
                expected="the same architecture, shapes, quantization, tokenizer and chat template",
                todo=f"stop the server, then `svc serve {target.version}`",
            )
        report("fits in place: same architecture, quantization, tokenizer and template")

    async def _replace(self, current: Target, target: Target, report: Report) -> tuple[SwapOutcome, str | None]:
        self._supervisor.enter(EngineState.DRAINING)
        try:
            await self._door.drained(self._drain_timeout_s)
        except TimeoutError:
            self._supervisor.enter(EngineState.READY)
            reason = f"{self._door.running} requests still ran after {self._drain_timeout_s:.0f} s"
            return SwapOutcome.REFUSED, f"{reason}\n  do: try again, or raise serve.drain_timeout_s"
        report("running requests ended")
        self._supervisor.enter(EngineState.SWAPPING)
        try:
            await self._load(target, report)
        except EngineError as error:
            log.warning("%s failed after its load", target, exc_info=error)
            report(f"failed: {error.wrong}")
            return await self._restore(current, report), str(error)
        self._routes.serve(Served(target.version, target.format))
        self._supervisor.enter(EngineState.READY)
        return SwapOutcome.SUCCEEDED, None

    async def _load(self, target: Target, report: Report) -> None:
        started = time.monotonic()
        client = self._supervisor.client
        await client.reload_weights(self._registry.artifact(target.version, target.format))
        await client.reset_prefix_cache()
        report(f"weights of {target} loaded in {time.monotonic() - started:.2f} s, prefix cache reset")
        report(await self._proof.probes(client, target))

    async def _restore(self, current: Target, report: Report) -> SwapOutcome:
        """The version before, in the same engine if it can still load, else in a new one.

        If even that fails the engine is left failed, and the reconciler goes on starting it.
        """
        try:
            await self._proof.files(current)
            await self._load(current, report)
        except SvcError as error:
            log.warning("the engine cannot go back to %s", current, exc_info=error)
            return await self._replace_engine(current, report)
        self._supervisor.enter(EngineState.READY)
        return SwapOutcome.RESTORED

    async def _replace_engine(self, current: Target, report: Report) -> SwapOutcome:
        report("the engine cannot go back: replacing it")
        try:
            await self._supervisor.start(current)
        except SvcError as error:
            log.exception("the new engine did not start")
            report(f"the new engine did not start: {error.wrong}")
        else:
            report(f"a new engine runs {current}")
        return SwapOutcome.FAILED
