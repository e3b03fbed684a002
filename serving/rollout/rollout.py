"""A rollout: the candidate is loaded, tried on copies of requests, then on a growing share of clients, then promoted.

    requested ─▶ loading ─▶ shadow ─▶ canary 5% ─▶ canary 25% ─▶ switching ─▶ promoted
                    └──────────┴────────────┴─────────────┴──▶ rolled back, undecided, cancelled or failed

Each state is stored before it takes effect, so that a server that is killed and restarted resumes from that state. The
production version stays loaded until the end: a rollback only changes where requests are sent. If there is memory for
only one engine, a replay of stored requests replaces the shadow and canary steps; see serving.rollout.replay.

If several servers serve the model, the server that holds the model's lease is the leader. Only the leader compares both
versions and changes the stored state. The other servers follow: they load the candidate and route the same clients to
it, so that the requests of all servers count as evidence. If another server takes the lease, the new leader continues
with the candidate that it has already loaded.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.engines.balancer import Balancer
from serving.engines.pool import EnginePool
from serving.rollout.cancellation import Cancellation, SupersededError
from serving.rollout.candidate import CandidateLoader, CandidatePlan, LoadedCandidate
from serving.rollout.engine_change import EngineChange
from serving.rollout.evidence import CanaryEvidence, Look, ShadowEvidence, doubts, exclusions, expectations
from serving.rollout.leadership import Leadership
from serving.rollout.replay import MIN_UNITS, QUIET_S, Kept, Replay, find_kept, require_replay
from serving.rollout.rollout_watch import RolloutWatch
from serving.rollout.shadow import Shadow
from serving.rollout.shadow_pairs import add_shadow_pair
from serving.rollout.split import Split
from serving.store_changes.changes import Changes
from svc.dataset.text.thinking import without_thinking
from svc.errors import EngineError, SvcError
from svc.evaluation.metrics.json_answers import is_json
from svc.registry.registry import Registry
from svc.settings.rollout import AtDeadline, UnitKind
from svc.store.desired import Desired, read_desired
from svc.store.leases import Lease, LeaseLostError
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
from svc.store.swaps import SwapOutcome, SwapResult, find_swap, last_queued_s, server_swaps
from svc.version import VersionId

log = logging.getLogger(__name__)

Result = TypeVar("Result")
ChangeTo = Callable[[Desired], Awaitable[SwapResult]]

_POLL_S = 0.25
_LOOK_S = 1.0
"""Seconds between two checks of whether the candidate is worse. The decision stays valid no matter how many checks
are made."""
_STORE_PAUSE_S = 2.0
_RESULT_S = 2.0
"""Seconds that a server may take to record why its swap failed, after it has made the previous version the desired
version again."""
_STOP_TIMEOUT_S = 45.0
"""Longest time, in seconds, that a stopping server waits for an interrupted replay to load the production version
again. The service manager allows a longer time to stop."""
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
        changes: notifications about changes in the store, which this object waits for.
        leadership: object that knows whether this server leads the model's rollouts.
        report: function called with the rollout's id and a description of each step.
        split: function that sets how the model's requests are split between two versions. Passing None sends all
            requests to production.
        active: whether a rollout is in progress. A rollout needs an engine with the production version.
        webhooks: URLs to which each transition is reported.
    """

    store: Store
    changes: Changes
    leadership: Leadership
    balancer: Balancer
    engine_change: EngineChange
    report: Callable[[int, str], None]
    split: Callable[[Split | None], None] = lambda split: None
    active: bool = False
    webhooks: tuple[str, ...] = ()

    @property
    def pool(self) -> EnginePool:
        return self.engine_change.pool

    @property
    def leads(self) -> bool:
        """Whether this server leads the model's rollouts. Exactly one of the servers that share the store is the
        leader.
        """
        return self.leadership.leads(self.pool.names.name)

    def takes_part(self, record: RolloutRecord, generation: int) -> bool:
        """Return whether this server must carry out a rollout now. Otherwise, it only has to serve the desired version.

        Args:
            generation: generation of the desired state that this server serves.
        """
        tried = record.state in (RolloutState.LOADING, RolloutState.SHADOW, RolloutState.CANARY)
        return self.leads or (tried and record.stop is None and record.generation == generation)

    async def abandon(self, why: str) -> None:
        """End the model's rollout, if there is one and this server leads it. Call this when `carry_out` has been
        cancelled.
        """
        with suppress(LeaseLostError):
            lease = self.leadership.lease(self.pool.names.name)
            if record := await asyncio.to_thread(active_rollout, self.store, self.pool.names.name):
                await self.end(record, lease, RolloutOutcome.CANCELLED, why)

    async def end(self, record: RolloutRecord, lease: Lease | None, outcome: RolloutOutcome, why: str | None) -> None:
        """Store the outcome of a rollout.

        Raises:
            LeaseLostError: another server leads the rollout now.
        """
        log.info("the rollout of %s ended: %s %s", record.target, outcome, why or "")
        await retrying(lambda: end_rollout(self.store, record.id, outcome, why, lease=lease, webhooks=self.webhooks))
        self.pool.metrics.rollout_ended(outcome)

    async def carry_out(self, record: RolloutRecord, change_to: ChangeTo) -> None:
        """Take part in a rollout, starting from its stored state, until it ends or this server has nothing left to do
        for it.

        The server that leads the rollout stores the outcome.

        Args:
            change_to: function that swaps to the candidate once it has become the desired version.
        """
        self.active = True
        try:
            await _Run(self, record, change_to).run()
        finally:
            self.active = False


class _Run:
    """One server's part in a rollout, as its leader or as a follower. The role can change.

    In both roles, the server loads the candidate and routes the same clients to it. Only the leader compares both
    versions and changes the rollout's stored state.
    """

    def __init__(self, rollouts: Rollouts, record: RolloutRecord, change_to: ChangeTo) -> None:
        self._parts = rollouts
        self._change_to = change_to
        self._store = rollouts.store
        self._loader = CandidateLoader(rollouts.engine_change.planner)
        self._record = record
        self._plan = record.plan
        self._watch = RolloutWatch(
            rollouts.store, rollouts.changes, rollouts.leadership, record, on_lapse=lambda: self._divide(None)
        )
        self._cancellation = self._watch.cancellation
        self._lease: Lease | None = None
        self._candidate: LoadedCandidate | None = None
        self._loaded = AsyncExitStack()
        self._report = partial(rollouts.report, record.id)
        self._signals: tuple[SignalRow, ...] = ()
        self._warned = set(record.steps)
        self._resumed_at = datetime.now(UTC)
        self._split = Split(record.id, 0.0, by_request=record.plan.unit is UnitKind.REQUEST)

    async def run(self) -> None:
        """Lead or follow the rollout until it ends or this server has nothing left to do for it."""
        watching = asyncio.create_task(self._watch.run())
        try:
            over = False
            while not over:
                over = await self._take_turn()
        except SupersededError as superseded:
            log.info("this server no longer follows the rollout of %s: %s", self._record.target, superseded)
        finally:
            watching.cancel()
            self._watch.close()
            await self._unload()

    async def _take_turn(self) -> bool:
        """Lead or follow the rollout until the role changes, and return whether nothing is left to do.

        Raises:
            SupersededError: this server follows the rollout, which was stopped or has ended.
        """
        parts, leads = self._parts, self._parts.leads
        try:
            self._lease = parts.leadership.lease(parts.pool.names.name) if leads else None
            # Read after the lease was taken: since then, no other server can change it.
            self._record = self._watch.renew(await retrying(self._watch.read))
            if self._record.state is RolloutState.ENDED:
                return True
            if leads:
                await self._lead()
                return True
            if self._record.state is RolloutState.SWITCHING:
                with suppress(StoppedError):  # the journal of swaps has the reason
                    await self._continue_switch()
                return True
            await self._follow()
        except LeaseLostError as lost:
            log.info("this server no longer leads the rollout of %s: %s", self._record.target, lost)
            if self._watch.lapsed:  # after a lapse during a state change, clients may have been sent there again
                self._divide(None)
            await asyncio.sleep(_POLL_S)
        return False

    async def _follow(self) -> None:
        """Route the same clients to the candidate as the leader does, until this server has to lead the rollout or
        swap to the candidate.

        If the candidate cannot be loaded or its engine dies, production answers all clients of this server.

        Raises:
            SupersededError: the rollout was stopped or has ended.
        """
        address = self._parts.leadership.address
        self._cancellation.check()
        try:
            candidate = self._candidate or await self._load_to_follow(lambda text: self._report(f"{address}: {text}"))
            while not self._must_act and not self._watch.lapsed:
                candidate.check()
                self._divide(self._split_of(self._watch.seen))
                await self._cancellation.interrupting(asyncio.sleep(_POLL_S))
            return
        except SupersededError:
            raise
        except Exception as error:  # any other defect, too: production answers, and other servers continue the rollout
            log.warning(
                "this server cannot route clients to %s; production answers all clients",
                self._record.target,
                exc_info=error,
            )
            await self._unload()
            self._report(f"{address}: {self._record.previous} serves all clients of this server: {error}")
        while not self._must_act:
            await self._cancellation.interrupting(asyncio.sleep(_POLL_S))

    @property
    def _must_act(self) -> bool:
        """Whether a follower must now lead, or swap to the candidate."""
        return self._parts.leads or self._watch.seen.state is RolloutState.SWITCHING

    async def _load_to_follow(self, report: Callable[[str], None]) -> LoadedCandidate:
        await self._production_ready()
        plan = await self._plan_candidate()
        if plan.shortage:
            raise EngineError(
                f"not enough memory to run {self._record.target} alongside the production version: {plan.shortage}"
            )
        return await self._load(plan, report)

    async def _lead(self) -> None:
        """Decide whether the candidate is promoted, and store the outcome.

        Raises:
            LeaseLostError: another server leads the rollout now.
        """
        record = self._record
        try:
            await self._promote()
            outcome, why = RolloutOutcome.PROMOTED, None
        except LeaseLostError:
            raise
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
        await self._unload()
        await self._parts.end(record, self._lease, outcome, why)

    async def _promote(self) -> None:
        """Go through the rollout's remaining states, and return once the candidate is in production.

        Raises:
            LeaseLostError: another server leads the rollout now.
            StoppedError, SupersededError, SvcError, OSError: the candidate was not promoted.
        """
        if self._record.state is not RolloutState.SWITCHING:
            self._cancellation.check()
            await self._try_candidate()
            await self._switch()
        await self._continue_switch()
        if self._parts.leadership.server:
            await self._unload()
            await self._await_others()

    async def _try_candidate(self) -> None:
        """Go through the steps that compare the candidate with production.

        Raises:
            LeaseLostError, StoppedError, SupersededError, SvcError, OSError: see `_promote`.
        """
        record, leadership = self._record, self._parts.leadership
        await self._production_ready()
        if record.state is RolloutState.REQUESTED:
            await self._enter(RolloutState.LOADING)
        else:
            why = f"{leadership.address} now leads the rollout" if leadership.server else "the server started again"
            self._report(f"{why}; the rollout continues at {place_of(RolloutView.of(record))}")
        candidate = self._candidate
        if candidate is None:
            plan = await self._plan_candidate()
            kept = await self._find_kept(plan)
            if record.state is RolloutState.REQUESTED:
                for text in await retrying(lambda: expectations(self._store, record, kept.total if kept else None)):
                    self._report(text)
            if kept is not None:
                await self._replay(kept)
                return
            candidate = await self._load(plan, self._report)
        if self._plan.shadow and record.state is not RolloutState.CANARY:
            await self._shadow(candidate)
        await self._canary(candidate)

    async def _plan_candidate(self) -> CandidatePlan:
        """Plan how to load the candidate."""
        record, registry = self._record, self._parts.engine_change.verification.registry
        plan = await self._loader.plan(record.previous, record.target, self._cancellation)
        expects_json = await asyncio.to_thread(_expects_json, registry, record.previous.version)
        self._split = replace(self._split, expects_json=expects_json)
        return plan

    async def _load(self, plan: CandidatePlan, report: Callable[[str], None]) -> LoadedCandidate:
        """Load the candidate and return it. It stays loaded until `_unload` is called."""
        record = self._record
        loading = self._loader.loaded(plan, record.previous, record.target, report, self._cancellation)
        self._candidate = await self._loaded.enter_async_context(loading)
        return self._candidate

    async def _unload(self) -> None:
        """Route all clients to production, and unload the candidate unless it is in production."""
        self._divide(None)
        self._candidate = None
        await self._loaded.aclose()

    async def _find_kept(self, plan: CandidatePlan) -> Kept | None:
        """Return the stored requests to replay if there is memory for only one engine, else None.

        Raises:
            RefusedError: the requests cannot be replayed.
        """
        if not plan.shortage:
            return None
        record, parts = self._record, self._parts
        kept = await retrying(lambda: find_kept(self._store, record, self._split))
        require_replay(
            record,
            plan,
            kept,
            len(parts.pool.members),
            load_s=await retrying(lambda: last_queued_s(self._store, record.previous)),
            queue_timeout_s=parts.pool.admission.queue_timeout_s,
        )
        return kept

    async def _shadow(self, candidate: LoadedCandidate) -> None:
        """Compare both versions' answers to `plan.shadow` requests. Clients receive production's answers."""
        if self._record.state is not RolloutState.SHADOW:
            await self._enter(RolloutState.SHADOW)
        parts, record, wanted = self._parts, self._record, self._plan.shadow
        shadow = Shadow(
            balancer=parts.balancer,
            admission=parts.pool.admission,
            metrics=parts.pool.metrics,
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
        """Compare the candidate's answers with production's stored answers. This is done when there is memory for only
        one engine.
        """
        if self._record.state is not RolloutState.SHADOW:
            await self._enter(RolloutState.SHADOW)
        parts = self._parts
        replay = Replay(
            engine_change=parts.engine_change,
            store=self._store,
            record=self._record,
            kept=kept,
            split=self._split,
            report=self._report,
        )
        previous = self._record.previous
        self._report(
            f"replay: comparing {replay.wanted} stored answers of {previous} from the request log with the "
            f"candidate's, whenever no request has arrived for {QUIET_S:g} s"
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
        self._report(
            f"{'no canary: there is memory for only one engine; ' if self._plan.canary else ''}{exclusions(look)}"
        )

    async def _canary(self, candidate: LoadedCandidate) -> None:
        """Route a growing share of clients to the candidate.

        A step ends once the evidence rules out that the candidate is worse than production by more than the margins.
        """
        evidence = CanaryEvidence(self._store, self._record)
        first = self._record.step if self._record.state is RolloutState.CANARY else 0
        for step, percent in list(enumerate(self._plan.canary[:-1]))[first:]:
            if self._record.state is not RolloutState.CANARY or step != first:
                await self._enter(RolloutState.CANARY, step)
            evidence.start_step(self._record.step_began_at)
            self._divide(self._split_of(self._record))
            self._report(f"canary: {self._record.target} serves {percent:g}% of clients")
            look = await self._until(candidate.check, evidence.look, partial(_is_passed, self._plan.min_units))
            self._report(f"canary at {percent:g}%: {look.text}")

    async def _until(
        self, check: Callable[[], None], look: Callable[[], Look], is_done: Callable[[Look], bool]
    ) -> Look:
        """Check the evidence regularly until the step is done.

        Args:
            check: function that raises an error if the step cannot continue.

        Raises:
            LeaseLostError: another server leads the rollout now.
            StoppedError: the candidate is proven to be worse, its engine died, or the deadline passed without a
                decision.
            SupersededError: a user stopped the rollout.
        """
        held = False
        while True:
            self._require_lead()
            seen = await retrying(look)
            if seen.signals != self._signals:
                self._signals = seen.signals
                await retrying(partial(store_signals, self._store, self._record.id, seen.signals, lease=self._lease))
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
                self._report(
                    f"{why}; staying at this step until the result is conclusive; to stop the rollout: svc rollback"
                )
            await self._cancellation.interrupting(asyncio.sleep(_LOOK_S))

    async def _switch(self) -> None:
        """Make the candidate the desired version.

        Raises:
            LeaseLostError: another server leads the rollout now.
            StoppedError: a user stopped the rollout, or another version was promoted.
        """
        record = self._record
        if not await retrying(lambda: switch_rollout(self._store, record, lease=self._lease)):
            current = await retrying(lambda: find_rollout(self._store, record.name, record.id))
            if current is None or current.state is not RolloutState.SWITCHING:  # else only the first reply was lost
                why = (current and current.stop) or "another version was promoted in the meantime"
                raise StoppedError(RolloutOutcome.CANCELLED, why)

    async def _continue_switch(self) -> None:
        """Swap to the candidate, which is already the desired version. The server may have been restarted since the
        candidate became the desired version.

        Raises:
            StoppedError: the swap failed, or another version became the desired version.
        """
        record, generation, server = self._record, self._record.generation + 1, self._parts.leadership.server
        while self._parts.pool.names.served != record.target:  # else the server was started with it
            desired = await retrying(lambda: read_desired(self._store, record.name))
            if desired is not None and desired.generation == generation:
                if self._parts.pool.names.served is None:  # the first start failed, and is tried again
                    await asyncio.sleep(_POLL_S)
                    continue
                result = await self._change_to(desired)
            else:
                swap = await retrying(lambda: find_swap(self._store, record.name, generation, server=server))
                result = (swap and swap.result) or SwapResult(
                    SwapOutcome.CANCELLED, f"{desired and desired.target} became the desired version"
                )
            if result.outcome is SwapOutcome.SUCCEEDED:
                return
            cancelled = result.outcome is SwapOutcome.CANCELLED
            outcome = RolloutOutcome.CANCELLED if cancelled else RolloutOutcome.FAILED
            raise StoppedError(outcome, result.reason or "the swap did not succeed")

    async def _await_others(self) -> None:
        """Wait until the other servers have swapped to the candidate too. If the swap fails on one of them, all servers
        return to the previous version.

        Raises:
            LeaseLostError: another server leads the rollout now.
            StoppedError: a swap failed, or another version became the desired version before all servers had swapped.
        """
        record, generation, overtaken_at = self._record, self._record.generation + 1, float("inf")
        while True:
            desired = await retrying(lambda: read_desired(self._store, record.name))
            swaps = await retrying(lambda: server_swaps(self._store, record.name, generation))
            others = [each for each in swaps if each.running and each.server != self._parts.leadership.server]
            results = [(each.address, each.swap.result if each.swap else None) for each in others]
            for address, result in results:
                if result and result.outcome not in (SwapOutcome.SUCCEEDED, SwapOutcome.CANCELLED):
                    raise StoppedError(RolloutOutcome.FAILED, f"{address}: {result.reason}")
            if all(result and result.outcome is SwapOutcome.SUCCEEDED for _, result in results):
                return
            if desired is None or desired.generation != generation:
                overtaken_at = min(overtaken_at, time.monotonic())
                if time.monotonic() >= overtaken_at + _RESULT_S:
                    raise StoppedError(
                        RolloutOutcome.CANCELLED, f"{desired and desired.target} became the desired version"
                    )
            self._require_lead()
            await asyncio.sleep(_POLL_S)

    async def _production_ready(self) -> None:
        """Wait until an engine with the production version is ready.

        Raises:
            EngineError: no engine was ready within the maximum duration of a step.
            SupersededError: a user stopped the rollout.
        """
        while not self._parts.pool.ready:
            if self._step_s() > self._plan.max_step_s:
                raise EngineError("no engine of the production version was ready")
            await self._cancellation.interrupting(asyncio.sleep(_POLL_S))

    async def _enter(self, state: RolloutState, step: int = 0) -> None:
        """Record in the store that the rollout has entered a state.

        Raises:
            LeaseLostError: another server leads the rollout now.
        """
        store, rollout, webhooks = self._store, self._record.id, self._parts.webhooks
        self._record = await retrying(
            lambda: enter_state(store, rollout, state, step, lease=self._lease, webhooks=webhooks)
        )

    def _require_lead(self) -> None:
        """Check that this server has led the rollout without interruption.

        Raises:
            LeaseLostError: this server does not lead the rollout, or another server may have taken it over.
        """
        leadership = self._parts.leadership
        if self._watch.lapsed or leadership.lease(self._parts.pool.names.name) != self._lease:
            raise LeaseLostError("another server may have taken over the rollout in the meantime")

    def _split_of(self, record: RolloutRecord) -> Split | None:
        """Return how clients are split between the two versions in the rollout's current state, or None if production
        answers all of them.
        """
        if record.state is not RolloutState.CANARY:
            return None
        return replace(self._split, share=record.plan.canary[record.step] / 100)

    def _divide(self, split: Split | None) -> None:
        self._parts.split(split)
        self._parts.pool.metrics.rollout_share(split.share if split else 0.0)

    def _step_s(self) -> float:
        """Return the number of seconds since the current step began, or since the server restarted if that is later."""
        return (datetime.now(UTC) - max(self._record.step_began_at, self._resumed_at)).total_seconds()


async def retrying(call: Callable[[], Result]) -> Result:
    """In a thread, call a function that accesses the store. Retry until the store responds, and return the result."""
    while True:
        try:
            return await asyncio.to_thread(call)
        except SQLAlchemyError:
            log_store_error(log, "the store is not responding; retrying")
            await asyncio.sleep(_STORE_PAUSE_S)


def _is_passed(units: int, look: Look) -> bool:
    """Return whether a step has passed.

    A step passes once enough units (users, conversations or single requests) have been observed, and every signal
    with data shows that the candidate is not worse than production by more than the margin.
    """
    return look.units >= units and look.is_passed


def _is_complete(look: Look) -> bool:
    return look.is_complete


def _expects_json(registry: Registry, version: VersionId) -> bool:
    """Return whether a version's answers should be JSON.

    This is the case if the version has held-out reference answers, and the first `_MAX_REFERENCES` of them are JSON.
    """
    references = [without_thinking(example.answer) for example in registry.heldout(version)[:_MAX_REFERENCES]]
    return bool(references) and all(map(is_json, references))
