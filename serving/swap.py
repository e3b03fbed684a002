"""The swap in place: another version in the engine that runs, with no request lost and none answered by two versions.

Check the files -> close the door -> let running requests end -> reload -> forget the prefix cache -> check the
probes -> open. Whatever fails after the reload ends with the version before, proven again, and the door opens only
then; a door that opens for any other reason finds no engine behind it. One copy of the weights in memory; no process
starts.
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
from svc.errors import EngineError, ProbeError, SvcError, SwapError
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
        except (SvcError, OSError) as error:
            log.warning("%s refused", target, exc_info=error)
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
        await self._proof.files(target)
        report("files match the manifest")
        if not await asyncio.to_thread(self._fits, current, target):
            raise SwapError(
                f"{target} does not fit in place of {current}",
                expected="the same architecture, shapes, quantization, tokenizer and chat template",
                todo=f"stop the server, then `svc serve {target.version}`",
            )
        report("fits in place: same architecture, quantization, tokenizer and template")

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

    async def _replace(self, current: Target, target: Target, report: Report) -> tuple[SwapOutcome, str | None]:
        self._supervisor.enter(EngineState.DRAINING)
        try:
            await self._drain()
        except EngineError as error:
            if await self._supervisor.client.healthy():
                self._supervisor.enter(EngineState.READY)
                return SwapOutcome.REFUSED, str(error)
            return await self._replace_engine(current, report), str(error)
        report("running requests ended")
        self._supervisor.enter(EngineState.SWAPPING)
        try:
            return await self._exchange(current, target, report)
        except BaseException:
            # Cancelled, or a defect. Nobody knows which weights the engine holds, so nobody may reach it.
            self._supervisor.enter(EngineState.FAILED)
            raise

    async def _drain(self) -> None:
        """Returns when no request runs: none that a client waits for, and none that one left behind in the engine.

        Raises:
            EngineError: some still ran after the timeout, or the engine is gone.
        """
        try:
            await self._door.drained(self._drain_timeout_s)
        except TimeoutError:
            raise EngineError(
                f"{self._door.running} requests still ran after {self._drain_timeout_s:.0f} s",
                todo="try again, or raise serve.drain_timeout_s",
            ) from None
        await self._supervisor.client.reset_prefix_cache()

    async def _exchange(self, current: Target, target: Target, report: Report) -> tuple[SwapOutcome, str | None]:
        try:
            await self._load(target, report)
        except Exception as error:  # whatever it was, weights that are not proven must not serve
            log.warning("%s failed after its load", target, exc_info=error)
            report(f"failed: {_line(error)}")
            return await self._restore(current, error, report), str(error) or repr(error)
        self._routes.serve(Served(target.version, target.format))
        self._supervisor.enter(EngineState.READY)
        return SwapOutcome.SUCCEEDED, None

    async def _load(self, target: Target, report: Report) -> None:
        started = time.monotonic()
        client = self._supervisor.client
        await client.reload_weights(await asyncio.to_thread(self._registry.artifact, target.version, target.format))
        await client.reset_prefix_cache()
        report(f"weights of {target} loaded in {time.monotonic() - started:.2f} s, prefix cache reset")
        report(await self._proof.probes(client, target))

    async def _restore(self, current: Target, error: Exception, report: Report) -> SwapOutcome:
        """The version before: in the same engine where that still answered, else in a new one.

        Anything but a failed probe, above all a reload that failed, is taken for the engine's death.
        """
        if not isinstance(error, ProbeError):
            return await self._replace_engine(current, report)
        try:
            await self._proof.files(current)
            await self._load(current, report)
        except Exception as second:  # as above
            log.warning("the engine cannot go back to %s", current, exc_info=second)
            return await self._replace_engine(current, report)
        self._supervisor.enter(EngineState.READY)
        return SwapOutcome.RESTORED

    async def _replace_engine(self, current: Target, report: Report) -> SwapOutcome:
        """A new engine with the version before. If it does not start, the reconciler goes on trying."""
        report("the engine cannot go on: replacing it")
        self._supervisor.count_restart()
        try:
            await self._supervisor.start(current)
        except Exception as error:
            log.exception("the new engine did not start")
            report(f"the new engine did not start: {_line(error)}")
        else:
            report(f"a new engine runs {current}")
        return SwapOutcome.FAILED


def _line(error: Exception) -> str:
    """An error as a step: what was wrong, without what to do."""
    return error.wrong if isinstance(error, SvcError) else repr(error)
