"""A rollout's shadow step when there is memory for only one engine. Live requests cannot be copied to a second engine,
so stored requests are replayed.

While no client sends requests, the candidate is loaded into the only engine and answers stored requests one at a time.
If a client's request arrives during that time, the request is queued, and the production version is loaded again
immediately to answer it.
"""

import asyncio
import itertools
import json
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.engines.pool import EnginePool
from serving.engines.replica import Replica
from serving.engines.transport import EngineDiedError, EngineRefusedError
from serving.protocols.request import InvalidJsonError, InvalidRequestError, parse_request
from serving.protocols.route import Route
from serving.rollout.cancellation import Cancellation, SupersededError, meanwhile
from serving.rollout.candidate import CandidatePlan
from serving.rollout.engine_change import EngineChange, SwapInProgress
from serving.rollout.shadow import Copy, CopyAnswer, compared, unit_of
from serving.rollout.shadow_pairs import ShadowPair, add_shadow_pair, read_shadow_pairs
from serving.rollout.split import Split
from serving.rollout.swap_plan import Plan
from serving.telemetry.deployment_metrics import ShadowOutcome
from svc.engine.state import EngineState
from svc.errors import EngineError, RefusedError, SvcError
from svc.redaction import PLACEHOLDERS
from svc.store.kept_requests import find_kept_requests, read_kept_request
from svc.store.requests import RequestRecord
from svc.store.rollouts import RolloutRecord, RolloutState
from svc.store.swaps import SwapKind, last_queued_s

log = logging.getLogger(__name__)

MAX_AGE = timedelta(days=7)
MIN_UNITS = 20
"""Smallest number of users, conversations or single requests to compare. If the candidate always fails, 16 are enough
to prove that it is worse."""
QUIET_S = 5.0
"""Seconds without requests before the candidate is loaded. Since clients' requests may have to wait while production
is not loaded, the value is doubled after each load.
"""
_MAX_QUIET_S = 300.0
_STOP_TIMEOUT_S = 45.0
"""Longest time, in seconds, that a stopping server waits for an interrupted replay to load the production version
again. The service manager allows a longer time to stop."""
_POLL_S = 0.25
_ROWS_PER_COMPARISON = 4
"""Number of stored requests to look up for each required comparison. Not every stored request can be replayed
unchanged."""
_ROUTE = Route.CHAT_COMPLETIONS


@dataclass(frozen=True, slots=True)
class ReplaySet:
    """Stored requests that a rollout can replay.

    Attributes:
        compared: number of comparisons that are already stored.
        rows: row ids of the requests that had not been replayed when the rollout started or resumed, newest first.
        units: number of distinct users, conversations or single requests among the requests to be compared. Counting
            stops at `MIN_UNITS`.
        done: number of `rows` that have been replayed or skipped since the rollout started or resumed.
    """

    compared: int
    rows: tuple[int, ...]
    units: int
    done: int = 0

    @property
    def total(self) -> int:
        """Number of comparisons that are already stored or can still be made."""
        return self.compared + len(self.rows) - self.done


def find_replayable(store: Store, record: RolloutRecord, split: Split) -> ReplaySet:
    """Return the production version's newest requests that were stored before the rollout and have not been replayed
    yet.

    Args:
        split: determines which requests belong to one user or conversation.
    """
    at, pairs = record.requested_at, read_shadow_pairs(store, record.id)
    rows = find_kept_requests(
        store,
        record.previous,
        route=_ROUTE.value,
        since=at - MAX_AGE,
        before=at,
        without=PLACEHOLDERS,
        before_row=min((pair.replayed for pair in pairs if pair.replayed is not None), default=None),
        limit=_ROWS_PER_COMPARISON * record.plan.shadow,
    )
    new = (_unit(store, row, split) for row in rows[: max(0, record.plan.shadow - len(pairs))])
    return ReplaySet(len(pairs), tuple(rows), _count_units(itertools.chain((pair.unit for pair in pairs), new)))


def _unit(store: Store, row: int, split: Split) -> str | None:
    kept = read_kept_request(store, row)
    copy = _copy(kept, split) if kept else None
    return unit_of(copy.record) if copy else None


def _count_units(units: Iterable[str | None]) -> int:
    """Return the number of distinct units (users, conversations or single requests), counting up to `MIN_UNITS`.

    Each empty string counts as a single request. `None` values are not counted.
    """
    known, count = set[str](), 0
    for unit in units:
        count += unit is not None and unit not in known
        if unit:
            known.add(unit)
        if count == MIN_UNITS:
            break
    return count


def require_replayable(
    store: Store, record: RolloutRecord, plan: CandidatePlan, split: Split, pool: EnginePool
) -> ReplaySet:
    """Return the stored requests to replay, which a rollout needs if only one engine fits in memory.

    Args:
        split: determines which requests belong to one user or conversation.
        pool: engines that run the production version.

    Raises:
        RefusedError: the requests cannot be replayed.
    """
    kept, load_s = find_replayable(store, record, split), last_queued_s(store, record.previous)
    engines, queue_timeout_s = len(pool.members), pool.admission.queue_timeout_s
    wrong = f"not enough memory to run {record.target} next to the production version: {plan.shortage}"
    others = "promote it without shadow and canary steps (--direct), or serve the model as adapters"
    if record.state is RolloutState.CANARY:
        raise RefusedError(wrong, todo=others)
    if engines > 1 or not plan.reloads:
        why = "several engines serve the model" if engines > 1 else plan.swap.why
        raise RefusedError(
            f"{wrong}; replaying stored requests is not possible either, because the candidate cannot be loaded in "
            f"place of the production version: {why}",
            todo=others,
        )
    if load_s is not None and 2 * load_s > queue_timeout_s:
        raise RefusedError(
            f"{wrong}; a request that arrives while stored requests are replayed may have to wait for two loads "
            f"of {load_s:.1f} s each, but would be rejected after {queue_timeout_s:g} s",
            expected=f"a `serve.queue_timeout_s` of at least {math.ceil(2 * load_s)} s",
            todo=f"set `serve.queue_timeout_s`, and restart the server; or {others}",
        )
    if record.plan.shadow < MIN_UNITS:
        raise RefusedError(
            f"{wrong}; stored requests can be replayed to the candidate instead, but a shadow step of "
            f"{record.plan.shadow} requests is too short for that",
            todo=f"replay at least {MIN_UNITS} stored requests (--shadow {MIN_UNITS}), or {others}",
        )
    if kept.total < MIN_UNITS:
        raise RefusedError(
            f"{wrong}; only {kept.total} stored requests to {record.previous} can be replayed",
            expected=f"at least {MIN_UNITS} chat completions with stored content from the last {MAX_AGE.days} days",
            todo=f"set `request_log.content_share`, and retry once enough requests are stored; or {others}",
        )
    if kept.units < MIN_UNITS:
        raise RefusedError(
            f"{wrong}; the replayable stored requests come from only {kept.units} users or conversations, and each "
            "user or conversation counts as one observation",
            expected=f"requests from at least {MIN_UNITS} users or conversations",
            todo="send a distinct `user` value for each end user; if requests are independent, set "
            f"models.{record.name}.rollout.unit: request; or {others}",
        )
    return kept


@dataclass(eq=False, kw_only=True)
class Replay:
    """Sends stored requests to a candidate and compares its answers with the stored answers.

    Attributes:
        requests: the requests, as found by `find_replayable`.
        split: determines which requests belong to one user, and whether answers should be JSON.
        report: function called with a description of each step.
    """

    engine_change: EngineChange
    store: Store
    record: RolloutRecord
    requests: ReplaySet
    split: Split
    report: Callable[[str], None]
    _quiet_s: float = field(default_factory=lambda: QUIET_S, init=False)
    _loans: int = field(default=0, init=False)
    _skipped: int = field(default=0, init=False)
    _queued_s: float = field(default=0.0, init=False)
    _adding: asyncio.Task[None] | None = field(default=None, init=False)

    @property
    def pool(self) -> EnginePool:
        return self.engine_change.pool

    @property
    def wanted(self) -> int:
        """Number of comparisons after which the shadow step ends. It is lower if stored requests cannot be replayed."""
        return min(self.record.plan.shadow, self.requests.total)

    @asynccontextmanager
    async def running(self) -> "AsyncIterator[asyncio.Task[None]]":
        """Replay the requests in a task during the `with` block. At its end, wait until the engine runs the production
        version again.
        """
        stop = Cancellation()
        replaying = asyncio.create_task(self._run(stop))
        try:
            yield replaying
        except asyncio.CancelledError:  # the server stops; clients still wait, and the next server may adopt the engine
            stop.ask("the server is stopping")
            await asyncio.wait({replaying}, timeout=_STOP_TIMEOUT_S)
            replaying.cancel()
            raise
        finally:
            stop.ask("the replay has ended")
            await asyncio.gather(replaying, return_exceptions=True)

    async def _run(self, stop: Cancellation) -> None:
        """Replay the requests, then leave the engine running the production version.

        Args:
            stop: ends the replay when it is canceled. This function returns only after the production version has been
                loaded again.

        Raises:
            SvcError: the candidate could not be loaded, or the engine died.
        """
        with suppress(SupersededError):
            while self.requests.compared < self.wanted:
                await stop.pause(_POLL_S)
                engine = self.pool.members[0]
                if self._is_quiet(engine):
                    async with stop.holding(self.pool, engine):
                        if self._is_quiet(engine):
                            await self._lend(engine, stop)
        if self._loans:
            self.report(
                f"replay: {self.record.previous} was unloaded for {self._queued_s:.1f} s (loads: {self._loans}); "
                f"{self._skipped} stored requests could not be replayed unchanged"
            )

    def _is_quiet(self, engine: Replica) -> bool:
        holds = engine.state is EngineState.READY and engine.target == self.record.previous
        return holds and self.pool.admission.idle_s >= self._quiet_s

    async def _lend(self, engine: Replica, stop: Cancellation) -> None:
        """Run the candidate in the engine until a client's request is queued, or all stored requests have been
        replayed.

        Raises:
            SupersededError: `stop` was requested.
            SvcError: see `_run`.
        """
        interrupt, record = Cancellation(), self.record
        plan = Plan(SwapKind.INPLACE, "stored requests are replayed")
        report = partial(log.info, "replay of stored requests: %s")
        change = SwapInProgress(record.previous, record.target, plan, report, interrupt)
        try:
            async with meanwhile(self._interrupt(interrupt, stop)), self.engine_change.borrowed(change, engine):
                self._loans += 1
                await self._replay(engine, interrupt)
        except SupersededError:
            stop.check()
        finally:
            self._quiet_s = min(2 * self._quiet_s, _MAX_QUIET_S)
            self._queued_s += change.queued_s or 0.0
            if self._adding:
                await asyncio.gather(self._adding, return_exceptions=True)  # if it failed, it is replayed again

    async def _interrupt(self, interrupt: Cancellation, stop: Cancellation) -> None:
        with suppress(SupersededError):
            await stop.interrupting(self.pool.admission.queue.wanted())
        interrupt.ask("the engine is needed for the production version")

    async def _replay(self, engine: Replica, interrupt: Cancellation) -> None:
        """Replay requests until all have been compared, or the store stops responding."""
        try:
            while self.requests.compared < self.wanted:
                pair = await interrupt.interrupting(self._replayed(engine, self.requests.rows[self.requests.done]))
                self._adding = asyncio.create_task(self._add(pair))
                await interrupt.outcome_of(self._adding)  # a client does not wait for the store
        except SQLAlchemyError:
            log.exception("could not read a stored request or store its comparison; retrying")

    async def _add(self, pair: ShadowPair | None) -> None:
        """Store the comparison of a replayed request. If `pair` is None, only count the request as skipped."""
        if pair is None:
            self._skipped += 1
        else:
            await asyncio.to_thread(add_shadow_pair, self.store, self.record.id, pair)
            self.pool.metrics.shadow_request(ShadowOutcome.FAILED if pair.candidate_failed else ShadowOutcome.COMPARED)
        self.requests = replace(
            self.requests, compared=self.requests.compared + (pair is not None), done=self.requests.done + 1
        )

    async def _replayed(self, engine: Replica, row: int) -> ShadowPair | None:
        """Send a stored request to the candidate, and return the comparison.

        Returns:
            None if the request was deleted or rejected by the engine, which may be due to parameters that are not
            stored. Also None if the answer is too large, or if the prompt no longer has its original length, for
            example because its tool definitions are missing.

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
            raise EngineError(f"the engine died while {self.record.target} was answering a stored request") from error
        except EngineRefusedError:
            return None
        except SvcError as error:
            log.info("the candidate failed on a stored request: %s", type(error).__name__)  # its text may be a client's
        seconds, tokens = time.monotonic() - began, copy.record.tokens_in
        if answer.is_too_large or (answer.usage and tokens is not None and answer.usage.prompt != tokens):
            return None
        pair = await asyncio.to_thread(compared, copy, answer, seconds, expects_json=self.split.expects_json)
        return replace(pair, replayed=row)


def _copy(kept: RequestRecord, split: Split) -> Copy | None:
    """Return a stored request as it is sent to the engine, or None if it cannot be read.

    The answer is streamed, so that a slow engine is not mistaken for one that has stopped responding.
    """
    fields = {"temperature": kept.temperature, "max_tokens": kept.max_tokens}
    try:
        body = {"model": "", "messages": json.loads(kept.prompt or ""), "stream": True}
        body |= {name: value for name, value in fields.items() if value is not None}
        request = parse_request(json.dumps(body).encode(), _ROUTE)
    except (ValueError, RecursionError, InvalidJsonError, InvalidRequestError) as error:
        log.warning("could not read the stored request %s: %s", kept.request_id, type(error).__name__)
        return None
    answer = json.dumps({"choices": [{"message": {"content": kept.answer}}]}).encode()
    unit = split.assign(kept.user_hash or request.who, random.random).unit
    return Copy(_ROUTE, request.members, [answer], kept._replace(unit=unit))
