"""Simulates rollouts of all kinds, each under all policies."""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np

from benchmarks.rollout import canary, thresholds
from benchmarks.rollout.canary import Decision
from benchmarks.rollout.traffic import EQUAL, Kind, generate
from svc.terminal import counting

OURS = "tuneserve"
CALIBRATED = (thresholds.ARGO_CALIBRATED, thresholds.FLAGGER_CALIBRATED)
CALIBRATED_ON = {"calibrated": tuple(EQUAL), "calibrated on independent traffic": tuple(EQUAL[:1])}
"""Kinds of equal candidates from which limits are derived. The rollouts of bad candidates have independent traffic. The
second kind therefore gives the best results that fixed limits can achieve there, and shows the effect of the same
limits in other traffic."""
POLICIES = (
    OURS,
    *(f"{policy.name}, {how}" for how in CALIBRATED_ON for policy in CALIBRATED),
    thresholds.ARGO.name,
    thresholds.FLAGGER.name,
)
_SECONDS = canary.DEADLINE_S * len(canary.SHARES)

Decisions = dict[str, list[Decision]]
"""Decisions on all rollouts of a kind, keyed by policy."""


@dataclass(frozen=True)
class Job:
    """One simulated rollout."""

    kind: Kind
    seed: int


@dataclass(frozen=True)
class Result:
    """Decisions on one rollout, and the measurements of policies whose limits are not known yet.

    Attributes:
        decisions, windows: keyed by policy.
    """

    decisions: dict[str, Decision]
    windows: dict[str, thresholds.Windows]


def run(job: Job) -> Result:
    """Simulate one rollout under all policies."""
    traffic = generate(job.kind, _SECONDS, job.seed)
    argo = thresholds.measure(traffic, thresholds.ARGO)
    decisions = {
        OURS: canary.decide(traffic),
        thresholds.ARGO.name: thresholds.decide(argo, thresholds.ARGO, np.array(thresholds.ARGO_LIMITS)),
        thresholds.FLAGGER.name: thresholds.advance_on_success(
            traffic, thresholds.FLAGGER, np.array(thresholds.FLAGGER_LIMITS)
        ),
    }
    return Result(decisions, {policy.name: thresholds.measure(traffic, policy) for policy in CALIBRATED})


def run_all(jobs: Sequence[Job], processes: int) -> list[Result]:
    """Simulate all rollouts."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    pool = ProcessPoolExecutor(processes, get_context("spawn"))
    with pool, counting("rollouts", len(jobs)) as advance:
        futures = [pool.submit(run, job) for job in jobs]
        for future in futures:
            future.add_done_callback(lambda _: advance())
        return [future.result() for future in futures]


def with_calibrated(results: dict[Kind, list[Result]], wrong: float) -> dict[Kind, Decisions]:
    """Return all decisions. The limits of calibrated policies are derived from the rollouts of equal candidates.

    Args:
        wrong: largest share of these rollouts that a calibrated policy rolls back.
    """
    decisions: dict[Kind, Decisions] = {
        kind: {name: [result.decisions[name] for result in of] for name in of[0].decisions}
        for kind, of in results.items()
    }
    for how, kinds in CALIBRATED_ON.items():
        for policy in CALIBRATED:
            equal = [result.windows[policy.name] for kind in kinds for result in results[kind]]
            limits = thresholds.calibrate(equal, policy, wrong)
            for kind, of in results.items():
                windows = (result.windows[policy.name] for result in of)
                decided = [thresholds.decide(each, policy, limits) for each in windows]
                decisions[kind][f"{policy.name}, {how}"] = decided
    return decisions
