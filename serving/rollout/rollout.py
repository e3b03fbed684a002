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
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial

from sqlalchemy import Engine as Store

from serving.engines.balancer import Balancer
from serving.engines.pool import EnginePool
from serving.rollout.cancellation import SupersededError, meanwhile
from serving.rollout.candidate import CandidateLoader, CandidatePlan, LoadedCandidate
from serving.rollout.decision import Decision
from serving.rollout.engine_change import EngineChange
from serving.rollout.evidence import CanaryEvidence, ShadowEvidence, exclusions, expectations, open_questions
from serving.rollout.leadership import Leadership
from serving.rollout.replay import MIN_UNITS, QUIET_S, Replay, ReplaySet, require_replayable
from serving.rollout.shadow import Shadow
from serving.rollout.shadow_pairs import add_shadow_pair
from serving.rollout.split import Split
from serving.rollout.store_retry import retrying
from serving.rollout.stored_rollout import StoppedError, StoredRollout
from serving.rollout.switch import Switch
from serving.store_changes.changes import Changes
from svc.errors import EngineError, SvcError
from svc.settings.rollout import UnitKind
from svc.store.desired import Desired
from svc.store.leases import Lease, LeaseLostError
from svc.store.rollout_text import place_of
from svc.store.rollouts import (
    RolloutOutcome,
    RolloutRecord,
    RolloutState,
    RolloutView,
    active_rollout,
    end_rollout,
)
from svc.store.swaps import SwapResult

log = logging.getLogger(__name__)

ChangeTo = Callable[[Desired], Awaitable[SwapResult]]

_POLL_S = 0.25


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
        await retrying(end_rollout, self.store, record.id, outcome, why, lease=lease, webhooks=self.webhooks)
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
        self._pool = rollouts.pool
        self._leadership = rollouts.leadership
        self._stored = StoredRollout(
            rollouts.store,
            rollouts.changes,
            rollouts.leadership,
            rollouts.webhooks,
            record,
            on_lapse=lambda: self._divide(None),
        )
        self._cancellation = self._stored.cancellation
        self._change_to = change_to
        self._previous, self._target, self._plan = record.previous, record.target, record.plan
        self._loader = CandidateLoader(rollouts.engine_change.planner)
        self._candidate: LoadedCandidate | None = None
        self._loaded = AsyncExitStack()
        self._report = partial(rollouts.report, record.id)
        self._decision = Decision(self._stored, self._report)
        self._split = Split(record.id, 0.0, by_request=record.plan.unit is UnitKind.REQUEST)

    async def run(self) -> None:
        """Lead or follow the rollout until it ends or this server has nothing left to do for it."""
        try:
            async with meanwhile(self._stored.watch()):
                over = False
                while not over:
                    over = await self._take_turn()
        except SupersededError as superseded:
            log.info("this server no longer follows the rollout of %s: %s", self._target, superseded)
        finally:
            self._stored.close()
            await self._unload()

    async def _take_turn(self) -> bool:
        """Lead or follow the rollout until the role changes, and return whether nothing is left to do.

        Raises:
            SupersededError: this server follows the rollout, which was stopped or has ended.
        """
        leads = self._parts.leads
        try:
            record = await self._stored.begin_turn(leads=leads)
            if record.state is RolloutState.ENDED:
                return True
            if leads:
                await self._lead()
                return True
            if record.state is RolloutState.SWITCHING:
                with suppress(StoppedError):  # the journal of swaps has the reason
                    await self._switch.finish()
                return True
            await self._follow()
        except LeaseLostError as lost:
            log.info("this server no longer leads the rollout of %s: %s", self._target, lost)
            if self._stored.lapsed:  # after a lapse during a state change, clients may have been sent there again
                self._divide(None)
            await asyncio.sleep(_POLL_S)
        return False

    @property
    def _switch(self) -> Switch:
        return Switch(self._parts.store, self._stored, self._leadership, self._pool.names, self._change_to)

    # A follower's part

    async def _follow(self) -> None:
        """Route the same clients to the candidate as the leader does, until this server has to lead the rollout or
        swap to the candidate.

        If the candidate cannot be loaded or its engine dies, production answers all clients of this server.

        Raises:
            SupersededError: the rollout was stopped or has ended.
        """
        address = self._leadership.address
        self._cancellation.check()
        try:
            candidate = self._candidate or await self._load_to_follow(lambda text: self._report(f"{address}: {text}"))
            while not self._must_act and not self._stored.lapsed:
                candidate.check()
                self._divide(self._split_of(self._stored.seen))
                await self._cancellation.pause(_POLL_S)
            return
        except SupersededError:
            raise
        except Exception as error:  # any other defect, too: production answers, and other servers continue the rollout
            log.warning(
                "this server cannot route clients to %s; production answers all clients", self._target, exc_info=error
            )
            await self._unload()
            self._report(f"{address}: {self._previous} serves all clients of this server: {error}")
        while not self._must_act:
            await self._cancellation.pause(_POLL_S)

    @property
    def _must_act(self) -> bool:
        """Whether a follower must now lead, or swap to the candidate."""
        return self._parts.leads or self._stored.seen.state is RolloutState.SWITCHING

    async def _load_to_follow(self, report: Callable[[str], None]) -> LoadedCandidate:
        await self._production_ready()
        plan = await self._plan_candidate()
        if plan.shortage:
            raise EngineError(
                f"not enough memory to run {self._target} alongside the production version: {plan.shortage}"
            )
        return await self._load(plan, report)

    # The leader's steps, in the order in which they happen

    async def _lead(self) -> None:
        """Decide whether the candidate is promoted, and store the outcome.

        Raises:
            LeaseLostError: another server leads the rollout now.
        """
        outcome, why = RolloutOutcome.PROMOTED, None
        try:
            await self._promote()
        except LeaseLostError:
            raise
        except StoppedError as stopped:
            outcome, why = stopped.outcome, stopped.why
        except SupersededError as superseded:
            outcome, why = RolloutOutcome.CANCELLED, str(superseded)
        except Exception as error:
            outcome, why = RolloutOutcome.FAILED, str(error)
            if isinstance(error, SvcError | OSError):
                log.warning("the rollout of %s failed", self._target, exc_info=error)
            else:  # a defect: the rollout ends, and the production version is still served
                log.exception("unexpected error in the rollout of %s", self._target)
                why = repr(error)
        await self._unload()
        await self._parts.end(self._stored.record, self._stored.lease, outcome, why)

    async def _promote(self) -> None:
        """Go through the rollout's remaining states, and return once the candidate is in production.

        Raises:
            LeaseLostError: another server leads the rollout now.
            StoppedError, SupersededError, SvcError, OSError: the candidate was not promoted.
        """
        if self._stored.record.state is not RolloutState.SWITCHING:
            self._cancellation.check()
            await self._try_candidate()
            await self._switch.begin()
        await self._switch.finish()
        if self._leadership.server:
            await self._unload()
            await self._switch.await_others()

    async def _try_candidate(self) -> None:
        """Go through the steps that compare the candidate with production.

        Raises:
            LeaseLostError, StoppedError, SupersededError, SvcError, OSError: see `_promote`.
        """
        record, store, address = self._stored.record, self._parts.store, self._leadership.address
        await self._production_ready()
        if record.state is RolloutState.REQUESTED:
            await self._stored.enter(RolloutState.LOADING)
        else:
            why = f"{address} now leads the rollout" if self._leadership.server else "the server started again"
            self._report(f"{why}; the rollout continues at {place_of(RolloutView.of(record))}")
        candidate = self._candidate
        if candidate is None:
            plan = await self._plan_candidate()
            kept = (
                await retrying(require_replayable, store, record, plan, self._split, self._pool)
                if plan.shortage
                else None
            )
            if record.state is RolloutState.REQUESTED:
                for text in await retrying(expectations, store, record, kept.total if kept else None):
                    self._report(text)
            if kept is not None:
                await self._replay(kept)
                return
            candidate = await self._load(plan, self._report)
        if self._plan.shadow and record.state is not RolloutState.CANARY:
            await self._shadow(candidate)
        await self._canary(candidate)

    async def _production_ready(self) -> None:
        """Wait until an engine with the production version is ready.

        Raises:
            EngineError: no engine was ready within the maximum duration of a step.
            SupersededError: a user stopped the rollout.
        """
        while not self._pool.ready:
            if self._stored.step_s > self._plan.max_step_s:
                raise EngineError("no engine of the production version was ready")
            await self._cancellation.pause(_POLL_S)

    async def _plan_candidate(self) -> CandidatePlan:
        """Plan how to load the candidate."""
        plan = await self._loader.plan(self._previous, self._target, self._cancellation)
        self._split = replace(self._split, expects_json=plan.expects_json)
        return plan

    async def _load(self, plan: CandidatePlan, report: Callable[[str], None]) -> LoadedCandidate:
        """Load the candidate and return it. It stays loaded until `_unload` is called."""
        loading = self._loader.loaded(plan, self._previous, self._target, report, self._cancellation)
        self._candidate = await self._loaded.enter_async_context(loading)
        return self._candidate

    async def _unload(self) -> None:
        """Route all clients to production, and unload the candidate unless it is in production."""
        self._divide(None)
        self._candidate = None
        await self._loaded.aclose()

    async def _replay(self, requests: ReplaySet) -> None:
        """Compare the candidate's answers with production's stored answers. This is done when there is memory for only
        one engine.
        """
        await self._enter_shadow()
        replay = Replay(
            engine_change=self._parts.engine_change,
            store=self._parts.store,
            record=self._stored.record,
            requests=requests,
            split=self._split,
            report=self._report,
        )
        self._report(
            f"replay: comparing {replay.wanted} stored answers of {self._previous} from the request log with the "
            f"candidate's, whenever no request has arrived for {QUIET_S:g} s"
        )
        evidence = ShadowEvidence(self._parts.store, self._stored.record, lambda: replay.wanted)
        async with replay.running() as replaying:
            result = await self._decision.reached(
                evidence.assess, lambda: replaying.result() if replaying.done() else None
            )
            await self._cancellation.outcome_of(replaying)
        self._report(f"replay: {result.text}")
        if why := open_questions(result, MIN_UNITS):
            raise StoppedError(RolloutOutcome.UNDECIDED, why)
        self._report(
            f"{'no canary: there is memory for only one engine; ' if self._plan.canary else ''}{exclusions(result)}"
        )

    async def _shadow(self, candidate: LoadedCandidate) -> None:
        """Compare both versions' answers to `plan.shadow` requests. Clients receive production's answers."""
        await self._enter_shadow()
        store, record, wanted = self._parts.store, self._stored.record, self._plan.shadow
        shadow = Shadow(
            balancer=self._parts.balancer,
            admission=self._pool.admission,
            metrics=self._pool.metrics,
            candidate=self._target.version,
            expects_json=self._split.expects_json,
            is_shared=candidate.engine is None,
            on_pair=partial(add_shadow_pair, store, record.id),
        )
        self._report(f"shadow: comparing the answers to {wanted} requests")
        async with meanwhile(shadow.run()):
            self._divide(replace(self._split, mirror=shadow))
            try:
                result = await self._decision.reached(
                    ShadowEvidence(store, record, lambda: wanted).assess, candidate.check
                )
            finally:
                self._divide(None)
        self._report(f"shadow: {result.text}")

    async def _enter_shadow(self) -> None:
        if self._stored.record.state is not RolloutState.SHADOW:
            await self._stored.enter(RolloutState.SHADOW)

    async def _canary(self, candidate: LoadedCandidate) -> None:
        """Route a growing share of clients to the candidate.

        A step ends once the evidence rules out that the candidate is worse than production by more than the margins.
        """
        evidence, resumed = CanaryEvidence(self._parts.store, self._stored.record), self._stored.record
        first = resumed.step if resumed.state is RolloutState.CANARY else 0
        for step, percent in list(enumerate(self._plan.canary[:-1]))[first:]:
            if resumed.state is not RolloutState.CANARY or step != first:
                await self._stored.enter(RolloutState.CANARY, step)
            evidence.start_step(self._stored.record.step_began_at)
            self._divide(self._split_of(self._stored.record))
            self._report(f"canary: {self._target} serves {percent:g}% of clients")
            result = await self._decision.reached(evidence.assess, candidate.check)
            self._report(f"canary at {percent:g}%: {result.text}")

    def _split_of(self, record: RolloutRecord) -> Split | None:
        """Return how clients are split between the two versions in the rollout's current state, or None if production
        answers all of them.
        """
        if record.state is not RolloutState.CANARY:
            return None
        return replace(self._split, share=record.plan.canary[record.step] / 100)

    def _divide(self, split: Split | None) -> None:
        self._parts.split(split)
        self._pool.metrics.rollout_share(split.share if split else 0.0)
