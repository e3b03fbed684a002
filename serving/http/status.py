"""What `/svc/status` shows: what serves, on which engines, what waits, and how the last swap went."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from sqlalchemy import Engine as Store

from serving.admission import Admission
from serving.background.holdout import HoldoutRuns
from serving.engines.pool import EnginePool
from serving.rollout.reconciler import Reconciler
from svc.store.swaps import SwapRecord, SwapResult, find_swap


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """Reads the status; called in a thread beside the event loop."""

    store: Store
    reconciler: Reconciler
    pool: EnginePool
    admission: Admission
    holdout: HoldoutRuns

    def read(self) -> Mapping[str, Any]:
        """JSON values."""
        actual, previous = self.reconciler.actual.target, self.reconciler.actual.previous
        unwritten = self.reconciler.journal.unwritten  # before the store is read: what is written meanwhile is there
        swap = find_swap(self.store, actual.version.name)
        return {
            "model": actual.version.name,
            "version": str(actual.version),
            "format": actual.format.value,
            "previous": str(previous) if previous else None,
            "engine": {
                "state": self.pool.state.value,
                "restarts": self.pool.restarts,
                "last_error": self.reconciler.last_error,
                "plan": plan.rows() if (plan := self.pool.members[0].plan) else None,
            },
            "engines": [
                {
                    "replica": engine.replica,
                    "state": engine.state.value,
                    "version": str(target.version) if (target := engine.target) else None,
                    "running": engine.running,
                }
                for engine in self.pool.all
            ],
            "requests": {"running": self.admission.running, "queued": self.admission.queued},
            "holdout": self.holdout.status(actual),
            "last_swap": swap and _swap_row(swap, swap.result or unwritten.get(swap.id)),
            "pid": os.getpid(),
        }


def _swap_row(swap: SwapRecord, result: SwapResult | None) -> dict[str, Any]:
    ended = asdict(result) if result else dict.fromkeys(field.name for field in fields(SwapResult))
    started = swap.started_at.isoformat(timespec="seconds")
    return {"to": str(swap.target), "generation": swap.generation, "started_at": started, **ended}
