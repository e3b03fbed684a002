"""Scores live answers by their log-probability under the served version, for comparison with held-out answers.

Only greedy answers whose content is stored unredacted are scored, because scores of sampled or redacted texts would
not be comparable. To be scored, an answer is sent to the engine as part of a prompt. Long answers are truncated to
the maximum length of a held-out answer. Answers are scored one at a time, spread evenly over the hour, after the
held-out set has been rerun. Only the messages of a request are stored, so the answer is scored without the request's
tools and without the engine's reasoning parser.
"""

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine as Store

from serving.background.scheduler import BackgroundScheduler, SupersededError
from serving.engines.pool import EnginePool
from serving.engines.replica import LoadedWeights
from serving.protocols.route import Route
from svc.engine.client import EngineClient
from svc.engine.state import EngineState
from svc.errors import EngineError, IntegrityError, NotFoundError
from svc.evaluation.evaluator import mean_logprob
from svc.evaluation.results import largest_limit
from svc.redaction import PLACEHOLDERS
from svc.registry.registry import Registry
from svc.store.kept_requests import KeptAnswer, keep_logprob, newest_unscored
from svc.version import Target

log = logging.getLogger(__name__)

_POLL_S = 5.0
_PAUSE_S = 60.0
"""Pause, in seconds, after an unexpected error or when there was nothing to score. It is this long because each search
for an answer to score reads all requests of the last hour."""
_OLDEST = timedelta(hours=1)
_MAX_SKIPPED = 500
"""Maximum number of remembered rows for which no score could be computed. Forgotten rows may be tried again, which
costs one request each."""


@dataclass(eq=False)
class LiveScores:
    """Scores live answers while the server runs.

    Attributes:
        busy: function that returns whether the held-out set currently has priority.
        per_hour: maximum number of answers scored per hour; 0 disables scoring.
    """

    scheduler: BackgroundScheduler
    busy: Callable[[], bool]
    pool: EnginePool
    registry: Registry
    store: Store
    per_hour: int
    _next_at: float = field(default=0.0, init=False)
    _passed: deque[int] = field(default_factory=lambda: deque(maxlen=_MAX_SKIPPED), init=False)
    _weights: LoadedWeights | None = field(default=None, init=False)
    _cut: int | None = field(default=None, init=False)

    async def run(self) -> None:
        """Score live answers until cancelled."""
        while True:
            pause_s = _POLL_S
            try:
                idle = self.pool.state is EngineState.READY and not self.busy()
                if self.per_hour and idle and self.scheduler.off is None:
                    pause_s = 0.0 if await self._score_newest() else _PAUSE_S
            except SupersededError:
                log.debug("skipped scoring an answer, because the engine has loaded different weights")
            except Exception:  # the boundary: serving and scoring continue
                log.exception("could not score live answers")
                pause_s = _PAUSE_S
            await asyncio.sleep(max(pause_s, self._next_at - time.monotonic()))

    async def _score_newest(self) -> bool:
        """Try to score the newest unscored answer. Return False if there is none.

        Raises:
            SupersededError: the engine was reloaded in the meantime.
        """
        primary = self.pool.primary
        if primary is None or primary.target is None:
            return False
        weights, target = primary.weights, primary.target
        if weights != self._weights:
            self._weights, self._cut = weights, await asyncio.to_thread(self._find_cut, target)
        cut = self._cut
        row = await asyncio.to_thread(self._find, target) if cut else None
        if row is None:
            return False
        self._passed.append(row.id)  # before the request, which may kill the engine
        self._next_at = time.monotonic() + 3600 / self.per_hour
        try:
            logprob = await self.scheduler.ask(weights, lambda client: _score(client, row, cut))
        except EngineError as error:
            log.info("could not score the answer in row %d of the request log: %s", row.id, error.wrong)
        else:
            await asyncio.to_thread(keep_logprob, self.store, row.id, logprob)
            self._passed.remove(row.id)
        return True

    def _find_cut(self, target: Target) -> int | None:
        """Return the largest answer token limit (`max_tokens`) among the version's held-out examples.

        Return None if the version has no readable held-out results.
        """
        try:
            return largest_limit(self.registry.results(target.version, target.format))
        except (NotFoundError, IntegrityError) as error:
            log.warning("not scoring live answers of %s: %s", target, error.wrong)
            return None

    def _find(self, target: Target) -> KeptAnswer | None:
        return newest_unscored(
            self.store,
            target,
            route=Route.CHAT_COMPLETIONS.value,
            since=datetime.now(UTC) - _OLDEST,
            without=PLACEHOLDERS,
            passed=self._passed,
        )


async def _score(client: EngineClient, row: KeptAnswer, cut: int | None) -> float:
    prompt = await client.prompt_tokens(json.loads(row.prompt))
    return await mean_logprob(client, prompt, (await client.tokens(row.answer))[:cut])
