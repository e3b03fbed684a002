"""Loads a rollout's candidate alongside the production version, either as an adapter or in a second engine."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass

from serving.engines.pool import EnginePool
from serving.engines.replica import Replica
from serving.rollout.cancellation import Cancellation
from serving.rollout.second_engine import start_second_engine
from serving.rollout.swap_plan import Plan, Report, SwapPlanner
from svc.dataset.text.thinking import without_thinking
from svc.engine.state import EngineState
from svc.errors import EngineError
from svc.evaluation.metrics.json_answers import is_json
from svc.registry.registry import Registry
from svc.store.swaps import SwapKind
from svc.version import Target, VersionId

log = logging.getLogger(__name__)

_MAX_REFERENCES = 200


@dataclass(frozen=True, slots=True, eq=False)
class LoadedCandidate:
    """A candidate that is loaded and answers requests.

    Attributes:
        engine: the candidate's own engine, or None if it is an adapter in the production version's engines.
    """

    engine: Replica | None

    def check(self) -> None:
        """Check that the candidate's engine is still running.

        Raises:
            EngineError: the engine died.
        """
        if self.engine is not None and self.engine.state is EngineState.FAILED:
            raise EngineError(f"the candidate's engine died: {self.engine.why}")


@dataclass(frozen=True, slots=True)
class CandidatePlan:
    """How a candidate can be loaded.

    Attributes:
        swap: plan for a swap from the production version to the candidate.
        shortage: why there is not enough memory for the candidate's own engine. None if there is enough, or if the
            candidate is loaded as an adapter in the production version's engines.
        expects_json: whether answers should be JSON.
    """

    swap: Plan
    shortage: str | None
    expects_json: bool

    @property
    def reloads(self) -> bool:
        """Whether production has only one engine, and the candidate's weights can be loaded into it in place."""
        return self.swap.kind is SwapKind.INPLACE and not self.swap.restart


@dataclass(frozen=True, slots=True, eq=False)
class CandidateLoader:
    """Loads candidates of one model."""

    planner: SwapPlanner

    @property
    def pool(self) -> EnginePool:
        return self.planner.pool

    async def plan(self, current: Target, target: Target, cancellation: Cancellation) -> CandidatePlan:
        """Compare the candidate's files with its manifest, and return how it can be loaded.

        Args:
            current: version loaded in the engines.

        Raises:
            NotFoundError, IntegrityError, EngineError: the candidate cannot be loaded.
            SupersededError: cancellation was requested.
        """
        swap = await cancellation.interrupting(self.planner.plan(current, target, lambda text: None))
        is_adapter = swap.kind is SwapKind.ADAPTER
        shortage = None if is_adapter else await cancellation.interrupting(self.planner.shortage(target))
        expects_json = await asyncio.to_thread(_expects_json, self.planner.verification.registry, current.version)
        return CandidatePlan(swap, shortage, expects_json)

    @asynccontextmanager
    async def loaded(
        self, plan: CandidatePlan, current: Target, target: Target, report: Report, cancellation: Cancellation
    ) -> AsyncIterator[LoadedCandidate]:
        """Load and verify a candidate, which answers requests for `NAME@candidate` during the `with` body.

        Afterwards its engine is stopped, unless a swap has made it an engine of the production version.

        Args:
            plan: a plan whose `shortage` is None.
            current: version loaded in the engines.
            report: function called with a description of each step.

        Raises:
            NotFoundError, IntegrityError, EngineError: the candidate cannot be loaded, or failed its probes.
            SupersededError: cancellation was requested before the candidate was loaded.
        """
        try:
            with ExitStack() as adapters:
                if plan.swap.kind is SwapKind.ADAPTER:
                    await cancellation.interrupting(self._load_adapter(target, adapters))
                    report(
                        f"{target} is loaded as an adapter in the engines that serve {current}, which has the same base"
                    )
                    loaded = LoadedCandidate(None)
                else:
                    loaded = LoadedCandidate(await self._start(target, report, cancellation))
                    self.pool.set_candidate(loaded.engine)
                self.pool.names.candidate, self.pool.names.candidate_on_demand = target.version, loaded.engine is None
                yield loaded
        finally:
            self.pool.names.candidate, self.pool.names.candidate_on_demand = None, False
            engine = self.pool.candidate
            self.pool.set_candidate(None)
            if engine is not None:
                self.pool.retirement.after_requests(engine)

    async def _load_adapter(self, target: Target, held: ExitStack) -> None:
        """Load the candidate's adapter in every engine, and keep the engines from evicting it."""
        for engine in self.pool.ready:
            held.callback((await engine.acquire_adapter(target.version)).leave)

    async def _start(self, target: Target, report: Report, cancellation: Cancellation) -> Replica:
        report(f"starting a second engine with {target}")
        engine, result = await start_second_engine(self.pool, target, cancellation)
        report(result)
        return engine


def _expects_json(registry: Registry, version: VersionId) -> bool:
    """Return whether a version's answers should be JSON.

    This is the case if the version has held-out reference answers, and the first `_MAX_REFERENCES` of them are JSON.
    """
    references = [without_thinking(example.answer) for example in registry.heldout(version)[:_MAX_REFERENCES]]
    return bool(references) and all(map(is_json, references))
