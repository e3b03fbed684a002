"""A rollout: the candidate is loaded, tried on copies of requests, then on a growing share of clients, then promoted.

    requested ─▶ loading ─▶ shadow ─▶ canary 5 % ─▶ canary 25 % ─▶ switching ─▶ promoted
                    └──────────┴────────────┴─────────────┴──▶ rolled back, undecided, cancelled or failed

Each state is stored before it takes effect, so that a server that was killed continues where it stopped. The production
version stays loaded until the end: a rollback only changes where requests are sent. Where memory holds one engine only,
stored requests are replayed instead of both steps, see serving.rollout.replay.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.admission.admission import Admission
from serving.model_names import ModelNames
from serving.replicas.balancer import Balancer
from serving.replicas.pool import EnginePool
from serving.rollout.cancellation import Cancellation, SupersededError
from serving.rollout.candidate import CandidateLoader, LoadedCandidate
from serving.rollout.engine_change import EngineChange
from serving.rollout.evidence import CanaryEvidence, Look, ShadowEvidence, doubts, exclusions, expectations
from serving.rollout.replay import MIN_UNITS, QUIET_S, Kept, Replay, find_kept, require_replay
from serving.rollout.shadow import Shadow
from serving.rollout.split import Split
from serving.telemetry.deployment_metrics import DeploymentMetrics
from svc.dataset.text.thinking import without_thinking
from svc.errors import EngineError, SvcError
from svc.evaluation.metrics.json_answers import is_json
from svc.registry.registry import Registry
from svc.settings import AtDeadline, UnitKind
from svc.store.changes import Changes
from svc.store.desired import Desired, read_desired
from svc.store.outage_log import log_store_error
from svc.store.rollout_text import place_of
from svc.store.rollouts import (
    RolloutOutcome,
    RolloutRecord,
    RolloutState,
    RolloutView,
    SignalRow,
    active_rollout,
    end_rollout,
    enter_state,
    find_rollout,
    store_signals,
    switch_rollout,
)
from svc.store.shadow_pairs import add_shadow_pair
from svc.store.swaps import SwapOutcome, SwapResult, find_swap, last_queued_s
from svc.version import VersionId

log = logging.getLogger(__name__)

Result = TypeVar("Result")
ChangeTo = Callable[[Desired], Awaitable[SwapResult]]

_POLL_S = 0.25
_LOOK_S = 1.0
"""Seconds between two checks of the evidence. Decisions remain valid no matter how often it is checked."""
_STORE_PAUSE_S = 2.0
_STOP_TIMEOUT_S = 45.0
"""Longest time to load the production version again when the server stops, which the service manager waits for."""
_MAX_REFERENCES = 200


class StoppedError(Exception):
    """Raised when a rollout must end without promoting its candidate."""

    def __init__(self, outcome: RolloutOutcome, why: str) -> None:
        super().__init__(why)
        self.outcome = outcome
        self.why = why


@dataclass(eq=False, kw_only=True)
class Rollouts:
    """Carries out one model's rollouts; see `serving.rollout.reconciler.Reconciler.follow`.

    Attributes:
        changes: changes in the store, for which this waits.
        report: function called with the rollout's id and a description of each step.
        split: function that sets how the model's requests are split between two versions. None sends them all
            to production.
        active: whether a rollout is in progress. It needs an engine with the production version.
        webhooks: URLs to which each transition is reported.
        server: id of this server; empty if no other server can use the store.
    """

    names: ModelNames
    store: Store
    changes: Changes
    registry: Registry
    pool: EnginePool
    admission: Admission
    balancer: Balancer
    loader: CandidateLoader
    engine_change: EngineChange
    metrics: DeploymentMetrics
    report: Callable[[int, str], None]
    split: Callable[[Split | None], None] = lambda split: None
    active: bool = False
    webhooks: tuple[str, ...] = ()
    server: str = ""

    async def abandon(self, why: str) -> None:
        """End the model's rollout, if there is one. Call this when `carry_out` has been cancelled."""
        if record := await asyncio.to_thread(active_rollout, self.store, self.names.name):
            await self._end(record, RolloutOutcome.CANCELLED, why)

    async def _end(self, record: RolloutRecord, outcome: RolloutOutcome, why: str | None) -> None:
        log.info("the rollout of %s ended: %s %s", record.target, outcome, why or "")
        await retrying(lambda: end_rollout(self.store, record.id, outcome, why, webhooks=self.webhooks))
        self.metrics.rollout_ended(outcome)

    async def carry_out(self, record: RolloutRecord, change_to: ChangeTo) -> None:
        """Continue a rollout from its stored state until it ends, and store the outcome.

        Args:
            change_to: function that swaps to the candidate once it has become the desired version.
        """
        cancellation = Cancellation()
        listening = asyncio.create_task(self._listen(record, cancellation))
        self.active = True
        try:
            await _Run(self, record, change_to, cancellation).run()
            outcome, why = RolloutOutcome.PROMOTED, None
        except StoppedError as stopped:
            outcome, why = stopped.outcome, stopped.why
        except SupersededError as superseded:
            outcome, why = RolloutOutcome.CANCELLED, str(superseded)
        except (SvcError, OSError) as error:
            log.warning("the rollout of %s failed", record.target, exc_info=error)
            outcome, why = RolloutOutcome.FAILED, str(error)
        except Exception as error:  # a defect: the rollout ends, and the production version is still served
            log.exception("unexpected error in the rollout of %s", record.target)
            outcome, why = RolloutOutcome.FAILED, repr(error)
        finally:
            listening.cancel()
            self.active = False
        await self._end(record, outcome, why)

    async def _listen(self, record: RolloutRecord, cancellation: Cancellation) -> None:
        """Cancel the rollout when a user stops it or another version becomes the desired one."""
        while True:
            count = self.changes.count
            try:
                current = await asyncio.to_thread(find_rollout, self.store, record.name, record.id)
                desired = await asyncio.to_thread(read_desired, self.store, record.name)
            except SQLAlchemyError:
                log_store_error(log, "could not read the rollout of %s; continuing it", record.target)
                await asyncio.sleep(_STORE_PAUSE_S)
            else:
                if current is not None and current.stop is not None:
                    cancellation.ask(current.stop)
                switching = current is not None and current.state is RolloutState.SWITCHING
                if desired is not None and desired.generation != record.generation and not switching:
                    cancellation.ask(f"{desired.target} was promoted meanwhile")
            await self.changes.wait(count, _POLL_S)


class _Run:
    """One rollout in progress."""

    def __init__(
        self, rollouts: Rollouts, record: RolloutRecord, change_to: ChangeTo, cancellation: Cancellation
    ) -> None:
        self._parts = rollouts
        self._change_to = change_to
        self._store = rollouts.store
        self._record = record
        self._plan = record.plan
        self._cancellation = cancellation
        self._report = partial(rollouts.report, record.id)
        self._signals: tuple[SignalRow, ...] = ()
        self._warned = set(record.steps)
        self._resumed_at = datetime.now(UTC)
        self._split = Split(record.id, 0.0, by_request=record.plan.unit is UnitKind.REQUEST)

    async def run(self) -> None:
        """Go through the rollout's remaining states, and return once the candidate is in production.

        Raises:
            StoppedError, SupersededError, SvcError, OSError: the candidate was not promoted.
        """
        record, parts = self._record, self._parts
        if record.state is RolloutState.SWITCHING:
            return await self._continue_switch()
        await self._production_ready()
        if record.state is RolloutState.REQUESTED:
            await self._enter(RolloutState.LOADING)
        else:
            self._report(f"the server started again; the rollout continues at {place_of(RolloutView.of(record))}")
        plan = await parts.loader.plan(record.previous, record.target, self._cancellation)
        kept = await retrying(lambda: find_kept(self._store, record, self._split)) if plan.shortage else None
        if kept is not None:
            require_replay(
                record,
                plan,
                kept,
                len(parts.pool.members),
                load_s=await retrying(lambda: last_queued_s(self._store, record.previous)),
                queue_timeout_s=parts.admission.queue_timeout_s,
            )
        if record.state is RolloutState.REQUESTED:
            for text in await retrying(lambda: expectations(self._store, record, kept.total if kept else None)):
                self._report(text)
        expects_json = await asyncio.to_thread(_expects_json, parts.registry, record.previous.version)
        self._split = replace(self._split, expects_json=expects_json)
        if kept is not None:
            await self._replay(kept)
            return await self._switch()
        async with parts.loader.loaded(
            plan, record.previous, record.target, self._report, self._cancellation
        ) as candidate:
            try:
                if self._plan.shadow and record.state is not RolloutState.CANARY:
                    await self._shadow(candidate)
                await self._canary(candidate)
                await self._switch()
            finally:
                self._divide(None)

    async def _shadow(self, candidate: LoadedCandidate) -> None:
        """Compare both versions' answers to `plan.shadow` requests. Clients receive production's answers."""
        if self._record.state is not RolloutState.SHADOW:
            await self._enter(RolloutState.SHADOW)
        parts, record, wanted = self._parts, self._record, self._plan.shadow
        shadow = Shadow(
            balancer=parts.balancer,
            admission=parts.admission,
            metrics=parts.metrics,
            candidate=record.target.version,
            expects_json=self._split.expects_json,
            is_shared=candidate.engine is None,
            on_pair=partial(add_shadow_pair, self._store, record.id),
        )
        self._report(f"shadow: comparing the answers to {wanted} requests")
        sending = asyncio.create_task(shadow.run())
        self._divide(replace(self._split, mirror=shadow))
        try:
            evidence = ShadowEvidence(self._store, record, lambda: wanted)
            look = await self._until(candidate.check, evidence.look, _is_complete)
        finally:
            self._divide(None)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        self._report(f"shadow: {look.text}")

    async def _replay(self, kept: Kept) -> None:
        """Compare the candidate's answers with stored answers of production, because memory fits only one engine."""
        if self._record.state is not RolloutState.SHADOW:
            await self._enter(RolloutState.SHADOW)
        parts = self._parts
        replay = Replay(
            engine_change=parts.engine_change,
            pool=parts.pool,
            admission=parts.admission,
            metrics=parts.metrics,
            store=self._store,
            record=self._record,
            kept=kept,
            split=self._split,
            report=self._report,
        )
        previous = self._record.previous
        self._report(
            f"replay: comparing {replay.wanted} stored answers of {previous} from the request log, whenever no "
            f"request has arrived for {QUIET_S:g} s"
        )
        stop = Cancellation()
        replaying = asyncio.create_task(replay.run(stop))
        try:
            evidence = ShadowEvidence(self._store, self._record, lambda: replay.wanted)
            look = await self._until(
                lambda: replaying.result() if replaying.done() else None,
                evidence.look,
                _is_complete,
            )
            await self._cancellation.outcome_of(replaying)
        except asyncio.CancelledError:  # the server stops; clients still wait, and the next server may adopt the engine
            stop.ask("the server is stopping")
            await asyncio.wait({replaying}, timeout=_STOP_TIMEOUT_S)
            replaying.cancel()
            raise
        finally:
            stop.ask("the replay has ended")
            await asyncio.gather(replaying, return_exceptions=True)
        self._report(f"replay: {look.text}")
        if why := doubts(look, MIN_UNITS):
            raise StoppedError(RolloutOutcome.UNDECIDED, why)
        self._report(f"{'no canary: memory holds one engine; ' if self._plan.canary else ''}{exclusions(look)}")

    async def _canary(self, candidate: LoadedCandidate) -> None:
        """Send a growing share of clients to the candidate.

        A step ends once a loss larger than the margins has been ruled out.
        """
        evidence = CanaryEvidence(self._store, self._record)
        first = self._record.step if self._record.state is RolloutState.CANARY else 0
        for step, percent in list(enumerate(self._plan.canary[:-1]))[first:]:
            if self._record.state is not RolloutState.CANARY or step != first:
                await self._enter(RolloutState.CANARY, step)
            evidence.start_step(self._record.step_began_at)
            self._divide(replace(self._split, share=percent / 100))
            self._report(f"canary: {percent:g} % of clients are answered by {self._record.target}")
            look = await self._until(candidate.check, evidence.look, partial(_is_passed, self._plan.min_units))
            self._report(f"canary at {percent:g} %: {look.text}")

    async def _until(
        self, check: Callable[[], None], look: Callable[[], Look], is_done: Callable[[Look], bool]
    ) -> Look:
        """Look at the evidence until the step is done.

        Args:
            check: raises an error if the step cannot go on.

        Raises:
            StoppedError: a loss was proven, the candidate's engine died, or the deadline passed without a decision.
            SupersededError: a user stopped the rollout.
        """
        held = False
        while True:
            seen = await retrying(look)
            if seen.signals != self._signals:
                self._signals = seen.signals
                await retrying(partial(store_signals, self._store, self._record.id, seen.signals))
            if seen.warning and seen.warning not in self._warned:
                self._warned.add(seen.warning)
                self._report(seen.warning)
            if seen.losses:
                raise StoppedError(RolloutOutcome.ROLLED_BACK, seen.losses)
            if is_done(seen):
                return seen
            try:
                check()
            except EngineError as error:
                raise StoppedError(RolloutOutcome.FAILED, str(error)) from error
            if self._step_s() >= self._plan.max_step_s and not held:
                why = f"no decision after {self._plan.max_step_s:g} s: {seen.text}"
                if self._plan.at_deadline is AtDeadline.ROLLBACK:
                    raise StoppedError(RolloutOutcome.UNDECIDED, why)
                held = True
                self._report(f"{why}; holding this step until it is decided, or stopped by svc rollback")
            await self._cancellation.interrupting(asyncio.sleep(_LOOK_S))

    async def _switch(self) -> None:
        """Make the candidate the desired version, and swap to it.

        Raises:
            StoppedError: a user stopped the rollout, another version was promoted, or the swap failed.
        """
        record = self._record
        if not await retrying(lambda: switch_rollout(self._store, record)):
            current = await retrying(lambda: find_rollout(self._store, record.name, record.id))
            if current is None or current.state is not RolloutState.SWITCHING:  # else only the first reply was lost
                why = (current and current.stop) or "another version was promoted meanwhile"
                raise StoppedError(RolloutOutcome.CANCELLED, why)
        await self._continue_switch()

    async def _continue_switch(self) -> None:
        """Swap to the candidate, which became the desired version, possibly before the server was started again.

        Raises:
            StoppedError: the swap failed, or another version became the desired one.
        """
        record, generation = self._record, self._record.generation + 1
        while self._parts.names.served != record.target:  # else the server was started with it
            desired = await retrying(lambda: read_desired(self._store, record.name))
            swap = await retrying(lambda: find_swap(self._store, record.name, generation, server=self._parts.server))
            result = swap.result if swap else None
            if result is None and desired is not None and desired.generation == generation:
                if self._parts.names.served is None:  # the first start failed, and is tried again
                    await asyncio.sleep(_POLL_S)
                    continue
                result = await self._change_to(desired)
            elif result is None:
                result = SwapResult(SwapOutcome.CANCELLED, f"{desired and desired.target} became the desired version")
            if result.outcome is SwapOutcome.SUCCEEDED:
                return
            cancelled = result.outcome is SwapOutcome.CANCELLED
            outcome = RolloutOutcome.CANCELLED if cancelled else RolloutOutcome.FAILED
            raise StoppedError(outcome, result.reason or "the swap did not succeed")

    async def _production_ready(self) -> None:
        """Wait until an engine with the production version is ready.

        Raises:
            StoppedError: none was ready within the longest duration of a step.
            SupersededError: a user stopped the rollout.
        """
        while not self._parts.pool.ready:
            if self._step_s() > self._plan.max_step_s:
                raise StoppedError(RolloutOutcome.FAILED, "no engine of the production version was ready")
            await self._cancellation.interrupting(asyncio.sleep(_POLL_S))

    async def _enter(self, state: RolloutState, step: int = 0) -> None:
        webhooks = self._parts.webhooks
        self._record = await retrying(lambda: enter_state(self._store, self._record.id, state, step, webhooks=webhooks))

    def _divide(self, split: Split | None) -> None:
        self._parts.split(split)
        self._parts.metrics.rollout_share(split.share if split else 0.0)

    def _step_s(self) -> float:
        """Return the number of seconds since the current step began, or since the server restarted if that is later."""
        return (datetime.now(UTC) - max(self._record.step_began_at, self._resumed_at)).total_seconds()


async def retrying(call: Callable[[], Result]) -> Result:
    """Call a function that accesses the store, in a thread. Retry until the store responds, and return the result."""
    while True:
        try:
            return await asyncio.to_thread(call)
        except SQLAlchemyError:
            log_store_error(log, "the store is not responding; retrying")
            await asyncio.sleep(_STORE_PAUSE_S)


def _is_passed(units: int, look: Look) -> bool:
    """Return whether the candidate has enough units and a loss beyond the margin is ruled out for every signal."""
    return look.units >= units and look.is_passed


def _is_complete(look: Look) -> bool:
    return look.is_complete


def _expects_json(registry: Registry, version: VersionId) -> bool:
    """Return whether a version's answers should be JSON, which is the case if all its held-out references are."""
    references = [without_thinking(example.answer) for example in registry.heldout(version)[:_MAX_REFERENCES]]
    return bool(references) and all(map(is_json, references))
