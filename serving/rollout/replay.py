"""The shadow step of a rollout where memory holds one engine: kept requests instead of copies of live ones.

While no client asks, the only engine is loaded with the candidate, which answers kept requests one at a time. Clients'
requests are queued meanwhile, and as soon as there is one, the production version is loaded again, which answers it.
"""

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.admission.admission import Admission
from serving.protocols.request import InvalidJsonError, InvalidRequestError, parse_request
from serving.protocols.route import Route
from serving.replicas.pool import EnginePool
from serving.replicas.replica import Replica
from serving.replicas.transport import EngineDiedError
from serving.rollout.cancellation import Cancellation, SupersededError
from serving.rollout.candidate import CandidatePlan
from serving.rollout.engine_change import EngineChange, SwapInProgress
from serving.rollout.shadow import Copy, CopyAnswer, compared
from serving.rollout.split import Split
from serving.rollout.swap_plan import Plan
from serving.telemetry.deployment_metrics import DeploymentMetrics, ShadowOutcome
from svc.engine.state import EngineState
from svc.errors import EngineError, RefusedError, SvcError
from svc.redaction import PLACEHOLDERS
from svc.store.kept_requests import find_kept_requests, read_kept_request
from svc.store.requests import RequestRecord
from svc.store.rollouts import RolloutRecord, RolloutState, ShadowPair, add_shadow_pair, read_shadow_pairs
from svc.store.swaps import SwapKind

log = logging.getLogger(__name__)

MAX_AGE = timedelta(days=7)
MIN_REQUESTS = 20
"""Smallest number of comparisons, unless fewer are configured."""
QUIET_S = 5.0
"""Time without requests before the engine is lent. It doubles each time, because a request may have had to wait."""
_MAX_QUIET_S = 300.0
_POLL_S = 0.25
_ROUTE = Route.CHAT_COMPLETIONS


@dataclass(frozen=True, slots=True)
class Kept:
    """The kept requests of a rollout.

    Attributes:
        compared: number of comparisons that are stored already.
        rows: row ids of the requests that were not replayed yet, newest first.
    """

    compared: int
    rows: tuple[int, ...]

    @property
    def total(self) -> int:
        """Number of comparisons already stored plus those that can still be made."""
        return self.compared + len(self.rows)


def find_kept(store: Store, record: RolloutRecord) -> Kept:
    """Return the production version's kept requests from before the rollout. This reads all prompts of the period."""
    at = record.requested_at
    rows = find_kept_requests(
        store, record.previous, route=_ROUTE.value, since=at - MAX_AGE, before=at, without=PLACEHOLDERS
    )
    pairs = read_shadow_pairs(store, record.id)
    last = min((pair.replayed for pair in pairs if pair.replayed is not None), default=None)
    return Kept(len(pairs), tuple(row for row in rows if last is None or row < last))


def require_replay(record: RolloutRecord, plan: CandidatePlan, kept: Kept, engines: int) -> None:
    """Check that kept requests can be replayed where memory does not suffice for a second engine.

    Args:
        engines: number of engines of the production version.

    Raises:
        RefusedError: they cannot.
    """
    wrong = f"not enough memory to run {record.target} next to the production version: {plan.shortage}"
    others = "promote it without shadow and canary steps (--direct), or serve the model as adapters"
    if record.state is RolloutState.CANARY:
        raise RefusedError(wrong, todo=others)
    if engines > 1 or not plan.reloads:
        why = "several engines serve the model" if engines > 1 else plan.swap.why
        raise RefusedError(f"{wrong}; nor can it be loaded in place to replay kept requests: {why}", todo=others)
    if not record.plan.shadow:
        raise RefusedError(
            f"{wrong}; a canary without a shadow step needs both versions loaded",
            todo=f"replay kept requests (--shadow N), {others}",
        )
    needed = min(record.plan.shadow, MIN_REQUESTS)
    if kept.total < needed:
        raise RefusedError(
            f"{wrong}; {kept.total} requests to {record.previous} are kept to be replayed",
            expected=f"at least {needed} chat completions of the last {MAX_AGE.days} days with stored content",
            todo=f"set `request_log.content_share`, and retry once enough requests are kept; or {others}",
        )


@dataclass(eq=False, kw_only=True)
class Replay:
    """Sends kept requests to a candidate and compares its answers with the kept ones.

    Attributes:
        kept: the requests, as found by `find_kept`.
        split: says which requests belong to one user, and whether answers should be JSON.
        report: called with the text of each step.
    """

    engine_change: EngineChange
    pool: EnginePool
    admission: Admission
    metrics: DeploymentMetrics
    store: Store
    record: RolloutRecord
    kept: Kept
    split: Split
    report: Callable[[str], None]
    _quiet_s: float = field(default_factory=lambda: QUIET_S, init=False)
    _loans: int = field(default=0, init=False)
    _skipped: int = field(default=0, init=False)
    _queued_s: float = field(default=0.0, init=False)

    @property
    def wanted(self) -> int:
        """Number of comparisons after which the step ends; it shrinks if kept requests cannot be replayed."""
        return min(self.record.plan.shadow, self.kept.total)

    async def run(self, stop: Cancellation) -> None:
        """Replay the requests, then leave the engine running the production version.

        Args:
            stop: ends the replay; the production version is loaded again before this function returns.

        Raises:
            SvcError: the candidate could not be loaded, or the engine died.
        """
        with suppress(SupersededError):
            while self.kept.compared < self.wanted:
                await stop.interrupting(asyncio.sleep(_POLL_S))
                engine = self.pool.members[0]
                if self._is_quiet(engine):
                    async with stop.holding(self.pool, [engine]):
                        if self._is_quiet(engine):
                            await self._lend(engine, stop)
        if self._loans:
            self.report(
                f"replay: {self.record.previous} was unloaded for {self._queued_s:.1f} s (loads: {self._loans}); "
                f"{self._skipped} kept requests could not be replayed as they were"
            )

    def _is_quiet(self, engine: Replica) -> bool:
        holds = engine.state is EngineState.READY and engine.target == self.record.previous
        return holds and self.admission.idle_s >= self._quiet_s

    async def _lend(self, engine: Replica, stop: Cancellation) -> None:
        """Lend the engine to the candidate until a client's request is queued, or all requests were replayed.

        Raises:
            SupersededError: `stop` was requested.
            SvcError: see `run`.
        """
        interrupt, record = Cancellation(), self.record
        watching = asyncio.create_task(self._interrupt(interrupt, stop))
        plan = Plan(SwapKind.INPLACE, "kept requests are replayed")
        report = partial(log.info, "replay of kept requests: %s")
        change = SwapInProgress(record.previous, record.target, plan, report, interrupt)
        try:
            async with self.engine_change.borrowed(change, engine):
                self._loans += 1
                await self._replay(engine, interrupt)
        except SupersededError:
            stop.check()
        finally:
            watching.cancel()
            self._quiet_s = min(2 * self._quiet_s, _MAX_QUIET_S)
            self._queued_s += change.queued_s or 0.0

    async def _interrupt(self, interrupt: Cancellation, stop: Cancellation) -> None:
        with suppress(SupersededError):
            await stop.interrupting(self.admission.queue.wanted())
        interrupt.ask("the engine is needed for the production version")

    async def _replay(self, engine: Replica, interrupt: Cancellation) -> None:
        """Replay requests until all are compared, or the store does not respond."""
        try:
            while self.kept.compared < self.wanted:
                await self._add(await interrupt.interrupting(self._replayed(engine, self.kept.rows[0])))
        except SQLAlchemyError:
            log.exception("could not read or store a kept request; retrying")

    async def _add(self, pair: ShadowPair | None) -> None:
        """Store a comparison. None stands for a request that cannot be replayed as it was."""
        if pair is None:
            self._skipped += 1
        else:
            await asyncio.to_thread(add_shadow_pair, self.store, self.record.id, pair)
            self.metrics.shadow_request(ShadowOutcome.FAILED if pair.candidate_failed else ShadowOutcome.COMPARED)
        self.kept = Kept(self.kept.compared + (pair is not None), self.kept.rows[1:])

    async def _replayed(self, engine: Replica, row: int) -> ShadowPair | None:
        """Send a kept request to the candidate, and return the comparison.

        Returns:
            None if the request was deleted, or if its prompt has another length than it had, as without its tools.

        Raises:
            EngineError: the engine died.
        """
        kept = await asyncio.to_thread(read_kept_request, self.store, row)
        copy = await asyncio.to_thread(_copy, kept, self.split) if kept else None
        if copy is None:
            return None
        began, answer = time.monotonic(), CopyAnswer()
        try:
            with engine.occupied():
                await answer.read(engine.http, engine.client.model, copy)
        except EngineDiedError as error:
            raise EngineError(f"the engine died while {self.record.target} answered a kept request") from error
        except SvcError as error:
            log.info("the candidate failed on a kept request: %s", error)
        seconds, tokens = time.monotonic() - began, copy.record.tokens_in
        if answer.usage and tokens is not None and answer.usage.prompt != tokens:
            return None
        pair = await asyncio.to_thread(compared, copy, answer, seconds, expects_json=self.split.expects_json)
        return replace(pair, replayed=row)


def _copy(kept: RequestRecord, split: Split) -> Copy | None:
    """Return a kept request as it is sent to the engine, or None if it cannot be read."""
    fields = {"temperature": kept.temperature, "max_tokens": kept.max_tokens}
    try:
        body = {"model": "", "messages": json.loads(kept.prompt or "")}
        body |= {name: value for name, value in fields.items() if value is not None}
        request = parse_request(json.dumps(body).encode(), _ROUTE)
    except (ValueError, RecursionError, InvalidJsonError, InvalidRequestError):
        log.warning("could not read the kept request %s", kept.request_id, exc_info=True)
        return None
    answer = json.dumps({"choices": [{"message": {"content": kept.answer}}]}).encode()
    unit = split.assign(kept.user_hash or request.who, random.random).unit
    return Copy(_ROUTE, request.members, [answer], kept._replace(unit=unit))
