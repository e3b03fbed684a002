"""Engine events of the week in chronological order: starts, sleeps, swaps and the crash loop."""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.week.timetable import (
    AWAKE_S,
    BLUE_GREEN_AT,
    CRASHES_AT,
    CRASHES_END,
    DAY_S,
    DAYS,
    HOLDOUT_EVERY_S,
    IDLE_AFTER_S,
    IN_PLACE_AT,
    MAIN,
    ROLLING_AT,
    SIDE,
    WAKES,
    at,
)
from svc.engine.state import EngineState
from svc.store.holdouts import HoldoutCause
from svc.store.swaps import SwapKind, SwapOutcome, SwapResult

DRAINING, FAILED, IDLE, READY = EngineState.DRAINING, EngineState.FAILED, EngineState.IDLE, EngineState.READY
RETIRING, STARTING, SWAPPING = EngineState.RETIRING, EngineState.STARTING, EngineState.SWAPPING
CRASH_S = 30.0
"""Time after which an engine dies during the crash loop, in seconds."""
BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
"""Delays before an engine is restarted, in seconds, as in the server (serving.rollout.reviver)."""
HOLDOUT_S = 300.0
"""Duration of a held-out evaluation, in seconds."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change to a model's engines.

    Attributes:
        states: new states of the engines, or None if unchanged.
        version: newly served version, or None if unchanged.
        restarted: whether an engine restarts after it died.
        swap: result of the swap that ends, or None if no swap ends.
        woke_s: seconds since the request that woke the idle model, which is now awake; None if no model
            wakes.
        holdout: cause of the held-out evaluation that ends, or None if no run ends.
    """

    at: float
    model: str
    states: tuple[EngineState, ...] | None = None
    version: int | None = None
    restarted: bool = False
    swap: SwapResult | None = None
    woke_s: float | None = None
    holdout: HoldoutCause | None = None


def changes() -> list[Change]:
    """Return all engine changes of the week."""
    changes = [
        Change(0.0, MAIN, (READY, READY), version=1),
        Change(0.0, SIDE, (READY,), version=1),
        *(Change(0.0, model, (IDLE,), version=1) for model in WAKES),
        *_in_place(),
        *_crash_loop(),
        *_rolling(),
        *_blue_green(),
        *(change for model in WAKES for change in _naps(model)),
    ]
    changes += [
        Change(begins + HOLDOUT_S, model, holdout=HoldoutCause.SCHEDULE)
        for model in (MAIN, SIDE)
        for begins in range(0, DAYS * DAY_S, HOLDOUT_EVERY_S)
    ]
    return sorted(changes, key=lambda change: change.at)


def _in_place() -> Iterator[Change]:
    yield Change(IN_PLACE_AT, SIDE, (DRAINING,))
    yield Change(IN_PLACE_AT + 3.4, SIDE, (SWAPPING,))
    result = SwapResult(SwapOutcome.SUCCEEDED, queued_s=5.0, running=1, queued=1, kind=SwapKind.INPLACE, took_s=6.0)
    yield Change(IN_PLACE_AT + 5.0, SIDE, (READY,), version=2, swap=result)
    yield Change(IN_PLACE_AT + 5.0 + HOLDOUT_S, SIDE, holdout=HoldoutCause.SWAP)


def _crash_loop() -> Iterator[Change]:
    """Yield the engine's deaths and starts, with the server's backoff after each death during startup."""
    now, failures = float(CRASHES_AT), 0
    yield Change(now, SIDE, (FAILED,))
    while True:
        now += BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]
        yield Change(now, SIDE, (STARTING,), restarted=True)
        if now >= CRASHES_END:
            break
        now += CRASH_S
        yield Change(now, SIDE, (FAILED,))
        failures += 1
    yield Change(now + 40.0, SIDE, (READY,))
    yield Change(now + 40.0 + HOLDOUT_S, SIDE, holdout=HoldoutCause.START)


def _rolling() -> Iterator[Change]:
    begins = float(ROLLING_AT)
    for states in ((DRAINING, READY), (READY, DRAINING)):
        yield Change(begins, MAIN, states)
        swapping = (SWAPPING, READY) if states[0] is DRAINING else (READY, SWAPPING)
        yield Change(begins + 4.0, MAIN, swapping)
        begins += 6.0
        yield Change(begins, MAIN, (READY, READY))
    result = SwapResult(SwapOutcome.SUCCEEDED, running=1, kind=SwapKind.ROLLING, took_s=12.0)
    yield Change(begins, MAIN, version=2, swap=result)
    yield Change(begins + HOLDOUT_S, MAIN, holdout=HoldoutCause.SWAP)


def _blue_green() -> Iterator[Change]:
    yield Change(BLUE_GREEN_AT, SIDE, (READY, STARTING))
    result = SwapResult(SwapOutcome.SUCCEEDED, running=1, kind=SwapKind.BLUEGREEN, took_s=70.0)
    yield Change(BLUE_GREEN_AT + 70.0, SIDE, (READY, RETIRING), version=3, swap=result)
    yield Change(BLUE_GREEN_AT + 75.0, SIDE, (READY,))
    yield Change(BLUE_GREEN_AT + 70.0 + HOLDOUT_S, SIDE, holdout=HoldoutCause.START)


def _naps(model: str) -> Iterator[Change]:
    """Yield the starts and sleeps of an idle model, which is woken by the first request of each period."""
    starts_s, moments = WAKES[model]
    for begins in map(at, moments):
        yield Change(begins + 1.0, model, (STARTING,))
        yield Change(begins + 1.0 + starts_s, model, (READY,), woke_s=starts_s)
        yield Change(begins + 1.0 + starts_s + HOLDOUT_S, model, holdout=HoldoutCause.START)
        yield Change(begins + AWAKE_S + IDLE_AFTER_S, model, (IDLE,))
