"""Loads the candidate of a rollout next to the production version: as an adapter, or in a second engine."""

import logging
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass

from serving.model_names import ModelNames
from serving.replicas.pool import EnginePool
from serving.replicas.replica import Replica
from serving.rollout.cancellation import Cancellation
from serving.rollout.second_engine import start_second_engine
from serving.rollout.swap_plan import Report, SwapPlanner
from svc.engine.state import EngineState
from svc.errors import EngineError, RefusedError
from svc.store.swaps import SwapKind
from svc.version import Target

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedCandidate:
    """A candidate that answers requests.

    Attributes:
        engine: the candidate's own engine; None if it is an adapter in the engines of the production version.
    """

    engine: Replica | None

    def check(self) -> None:
        """Check that the candidate's engine still runs.

        Raises:
            EngineError: the engine died.
        """
        if self.engine is not None and self.engine.state is EngineState.FAILED:
            raise EngineError(f"the candidate's engine died: {self.engine.why}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CandidateLoader:
    """Loads candidates of one model."""

    planner: SwapPlanner
    pool: EnginePool
    names: ModelNames

    @asynccontextmanager
    async def loaded(
        self, current: Target, target: Target, report: Report, cancellation: Cancellation
    ) -> AsyncIterator[LoadedCandidate]:
        """Load and verify a candidate; it answers requests for `NAME@candidate` during the body.

        Afterwards its engine is stopped, unless a swap has made it an engine of the production version.

        Args:
            current: version that the engines hold.
            report: called with the text of each step.

        Raises:
            NotFoundError, IntegrityError, EngineError: the candidate cannot be loaded, or failed its probes.
            RefusedError: there is not enough memory for a second engine.
            SupersededError: cancellation was requested before the candidate was loaded.
        """
        plan = await cancellation.interrupting(self.planner.plan(current, target, lambda text: None))
        try:
            with ExitStack() as adapters:
                if plan.kind is SwapKind.ADAPTER:
                    await cancellation.interrupting(self._load_adapter(target, adapters))
                    report(f"{target} is loaded as an adapter in the engines of {current}, which share its base")
                    loaded = LoadedCandidate(None)
                else:
                    loaded = LoadedCandidate(await self._start(target, report, cancellation))
                    self.pool.set_candidate(loaded.engine)
                self.names.candidate, self.names.candidate_on_demand = target.version, loaded.engine is None
                yield loaded
        finally:
            self.names.candidate, self.names.candidate_on_demand = None, False
            engine = self.pool.candidate
            self.pool.set_candidate(None)
            if engine is not None:
                self.pool.retirement.after_requests(engine)

    async def _load_adapter(self, target: Target, held: ExitStack) -> None:
        """Load the adapter in every engine, and keep the engines from evicting it."""
        for engine in self.pool.ready:
            held.callback((await engine.bring_adapter(target.version)).leave)

    async def _start(self, target: Target, report: Report, cancellation: Cancellation) -> Replica:
        shortage = await cancellation.interrupting(self.planner.shortage(target))
        if shortage:
            raise RefusedError(
                f"not enough memory to run {target} next to the production version: {shortage}",
                todo="promote it without shadow and canary steps (--direct), or serve the model as adapters",
            )
        report(f"starting a second engine with {target}")
        engine, result = await start_second_engine(self.pool, target, cancellation)
        report(result)
        return engine
