"""Reruns the served version's held-out set on its engine at regular intervals.

After every weight load, and then every few hours, the examples that were answered at registration are
sent again in the same way. If there are many examples, only a sample is sent. A run's results are stored as a
database row. They are not evaluated here.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from typing import Any

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.background.scheduler import BackgroundScheduler, SupersededError
from serving.engines.pool import EnginePool
from serving.engines.replica import LoadedWeights
from serving.telemetry.deployment_metrics import DeploymentMetrics
from svc.dataset.schema.example import any_call_tools
from svc.engine.client import EngineClient
from svc.engine.probes import EngineFacts
from svc.engine.state import EngineState
from svc.errors import EngineError, NotFoundError, SvcError
from svc.evaluation.evaluator import ask_example
from svc.evaluation.metrics.metric import Answered
from svc.evaluation.metrics.text import ExactMatch
from svc.evaluation.results import ExampleResult
from svc.registry.primary_metric import watched_metric
from svc.registry.registry import Registry
from svc.store.holdouts import HoldoutCause, HoldoutOutcome, HoldoutRun, add_holdout_run, newest_holdout_run
from svc.store.kept_requests import MOST_TOKENS
from svc.version import Target

log = logging.getLogger(__name__)

_Ask = Callable[[EngineClient], Awaitable[ExampleResult]]
_POLL_S = 1.0
_PAUSE_S = 60.0
"""Pause after an unexpected error or a failed write to the store, in seconds."""
_NEVER = "`holdout.every_hours` is 0"
_ELSEWHERE = "another server that uses this store runs the held-out set"
MAX_EXAMPLES = 200
"""Maximum number of examples per run. Each example waits at most 30 s (`scheduler.PATIENCE_S`) for an idle engine, so
200 examples take less than two hours."""


class HoldoutState(StrEnum):
    """State of the periodic evaluations on held-out examples: off, waiting or in progress."""

    OFF = "off"
    WAITING = "waiting"
    RUNNING = "running"


@dataclass(eq=False)
class HoldoutRuns:
    """Evaluates the served version on its held-out set after each start or swap, and periodically. Each evaluation is
    called a run.

    Attributes:
        facts: function that returns the kind of engine that serves a version in a given format.
        every_hours: interval between the starts of two runs, in hours. 0 disables the runs.
        run_functions: whether a version's own metric function may be run.
        leads: function that returns whether this server is the model's leader. If there are several servers, only the
            leader performs the runs.
    """

    scheduler: BackgroundScheduler
    pool: EnginePool
    registry: Registry
    store: Store
    metrics: DeploymentMetrics
    facts: Callable[[Target], Awaitable[EngineFacts]]
    every_hours: float
    run_functions: bool = False
    leads: Callable[[], bool] = lambda: True
    _done: LoadedWeights | None = field(default=None, init=False)
    _next_at: float = field(default=0.0, init=False)
    _progress: tuple[int, int] | None = field(default=None, init=False)  # examples asked, and all
    _nothing_to_ask: str | None = field(default=None, init=False)

    @property
    def under_way(self) -> bool:
        """Whether a run is in progress or due."""
        return self._progress is not None or self._due() is not None

    async def run(self) -> None:
        """Until cancelled, evaluate the served version on its held-out examples whenever this is due."""
        if not self.every_hours:
            log.warning("not scheduling further held-out evaluations: %s", _NEVER)
        while True:
            try:
                cause = self._due()
                if cause:
                    await self._ask_all(cause)
            except SupersededError:
                log.info("discarded a held-out evaluation, because the engine's weights changed during the run")
            except Exception:  # the boundary: serving and later runs continue
                log.exception("the held-out evaluation failed unexpectedly")
                await asyncio.sleep(_PAUSE_S)
            await asyncio.sleep(_POLL_S)

    def status(self, target: Target) -> dict[str, Any]:
        """Return the section of /svc/status about the served version's held-out evaluation. This reads the store."""
        last = newest_holdout_run(self.store, target, completed=False)
        asked, total = self._progress or (0, 0)
        off = self._nothing_to_ask or self.scheduler.off if self.every_hours else _NEVER
        off = off or (None if self.leads() else _ELSEWHERE)
        state = HoldoutState.OFF if off else HoldoutState.RUNNING if self._progress else HoldoutState.WAITING
        return {
            "state": state.value,
            "reason": off,
            "asked": asked,
            "total": total,
            "last_run": last
            and {
                "cause": last.cause.value,
                "ended_at": last.ended_at.isoformat(timespec="seconds"),
                "outcome": last.outcome.value,
                "reason": last.reason,
            },
        }

    def _due(self) -> HoldoutCause | None:
        """Return the reason why an evaluation on the held-out examples is due now, or None if none is due."""
        weights = self.pool.weights
        if not self.every_hours or not self.leads():
            return None
        if self.scheduler.unfit or self.pool.state is not EngineState.READY:
            return None
        if weights != self._done:
            return HoldoutCause.START if weights.fresh else HoldoutCause.SWAP
        return HoldoutCause.SCHEDULE if time.monotonic() >= self._next_at else None

    async def _ask_all(self, cause: HoldoutCause) -> None:
        """Evaluate the served version on its held-out examples once, and store the outcome.

        Raises:
            SupersededError: the evaluation was cancelled and must be restarted.
        """
        primary = self.pool.primary
        if primary is None or primary.target is None:
            return
        weights, target = primary.weights, primary.target
        began, started_at = time.monotonic(), datetime.now(UTC)
        self.metrics.holdout_due(target, self.every_hours * 3600)
        facts = await self.facts(target)
        results, reason = await self._attempt(weights, target, cause)
        self._done, self._next_at = weights, began + self.every_hours * 3600
        if self._nothing_to_ask:
            self._next_at = math.inf
            self.metrics.holdout_due(None, self.every_hours * 3600)
            return
        run = HoldoutRun(
            target=target,
            engine=facts,
            cause=cause,
            started_at=started_at,
            ended_at=datetime.now(UTC),
            outcome=HoldoutOutcome.FAILED if reason else HoldoutOutcome.COMPLETED,
            reason=reason,
            places=tuple(results),
            hits=tuple(result.hit for result in results.values()),
            nll=tuple(result.nll for result in results.values()),
        )
        await self._keep(await asyncio.to_thread(self._scored, run, results))

    def _scored(self, run: HoldoutRun, results: dict[int, ExampleResult]) -> HoldoutRun:
        """Score the answers of a run by the metric that monitoring watches, or by exact match if that metric fails."""
        if not results:
            return run
        try:
            metric = watched_metric(self.registry, run.target, run_functions=self.run_functions)
            examples = self.registry.heldout(run.target.version)
            scores = metric.checked_score(Answered([examples[place] for place in results], list(results.values())))
        except Exception:  # the boundary: a metric may come from a package, or be a function of the user
            log.warning(
                "the primary metric of %s cannot be computed on this server; using exact match instead",
                run.target,
                exc_info=True,
            )
            return replace(run, metric=ExactMatch.name, scores=tuple(map(float, run.hits)))
        return replace(run, metric=metric.name, scores=tuple(scores))

    async def _keep(self, run: HoldoutRun) -> None:
        """Store a run, retrying until it succeeds.

        The results of an hour-long run must not be lost just because the store is busy.
        """
        while True:
            try:
                return await asyncio.to_thread(add_holdout_run, self.store, run)
            except SQLAlchemyError:
                log.exception("could not store the held-out evaluation of %s; retrying", run.target)
                await asyncio.sleep(_PAUSE_S)

    async def _attempt(
        self, weights: LoadedWeights, target: Target, cause: HoldoutCause
    ) -> tuple[dict[int, ExampleResult], str | None]:
        """Send all examples. Return the results keyed by example index, or the reason why there are no results."""
        self._nothing_to_ask = None
        try:
            questions = await asyncio.to_thread(self._find_set, target)
            if self.scheduler.off:
                raise EngineError(self.scheduler.off)
            log.info("held-out evaluation (%s): sending %d held-out examples of %s", cause, len(questions), target)
            return await self._ask_each(weights, questions), None
        except SupersededError:
            raise
        except NotFoundError as error:
            self._nothing_to_ask = error.wrong
            log.warning("skipping the held-out evaluation of %s: %s", target, error.wrong)
            return {}, error.wrong
        except Exception as error:  # any error is the outcome of this run
            log.exception("the held-out evaluation of %s failed", target)
            return {}, error.wrong if isinstance(error, SvcError) else repr(error)

    def _find_set(self, target: Target) -> Mapping[int, _Ask]:
        """Return functions that each send one selected example to an engine, keyed by the example's index in the file.

        New answers have the same token limit as the registered answers.
        """
        registered = self.registry.results(target.version, target.format)
        examples = self.registry.heldout(target.version)[: len(registered)]
        tokenized = self.registry.heldout_tokens(target.version)
        ask = partial(ask_example, find_calls=any_call_tools(examples))
        questions = {
            place: partial(ask, example=examples[place], tokenized=tokenized[place], limit=registered[place].limit)
            for place in _evenly(len(registered), MAX_EXAMPLES)
            if len(tokenized[place].input_ids)
            <= MOST_TOKENS  # vLLM does not budget memory for the logits of more tokens
        }
        if not questions:
            raise NotFoundError(f"every held-out example of {target.version} is longer than {MOST_TOKENS} tokens")
        return questions

    async def _ask_each(self, weights: LoadedWeights, questions: Mapping[int, _Ask]) -> dict[int, ExampleResult]:
        results: dict[int, ExampleResult] = {}
        try:
            for place, ask in questions.items():
                self._progress = len(results), len(questions)
                results[place] = await self.scheduler.ask(weights, ask)
        finally:
            self._progress = None
        return results


def _evenly(total: int, most: int) -> list[int]:
    """Return at most `most` indexes, spread evenly over `range(total)`."""
    count = min(total, most)
    return [(2 * at + 1) * total // (2 * count) for at in range(count)]
