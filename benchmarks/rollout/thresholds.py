"""Fixed thresholds on windows of the candidate's metrics, as Argo Rollouts and Flagger use them.

Both query the candidate's metrics at an interval, compare each with a fixed limit, and roll back after a number of
failed measurements, which need not be consecutive. Nothing is compared with production.

- Argo Rollouts' documentation ("Analysis & Progressive Delivery", background analysis): `interval: 5m`,
  `successCondition: result >= 0.95`, `failureLimit: 3`, so the fourth failed measurement rolls back; ten minutes at
  each weight.
- Flagger's documentation ("Metrics Analysis", "How it works"): `interval: 1m`, `threshold: 5`,
  `request-success-rate` at least 99%, `request-duration` (99th percentile) at most 500 ms; the weight grows with each
  successful measurement, and a failed one delays it.
"""

from dataclasses import dataclass

import numpy as np

from benchmarks.rollout.canary import SHARES, Decision, End
from benchmarks.rollout.traffic import Floats, Traffic

SIGNALS = 4
"""Errors, invalid outputs, percentile of the first token in seconds, bad ratings; the columns of all measurements."""
NO_LIMIT = float("inf")


@dataclass(frozen=True)
class Policy:
    """How often a candidate is measured, and when it advances or is rolled back.

    Attributes:
        window_s: interval of the measurements, and length of their windows.
        failures: number of failed measurements that cause a rollback.
        step_s: time at each share, or None to stay until one measurement succeeds.
        percentile: percentile of the time to first token that is compared.
    """

    name: str
    window_s: float
    failures: int
    step_s: tuple[float, ...] | None
    percentile: float = 0.95


ARGO = Policy("Argo, as documented", 300, 4, (600, 600))
ARGO_LIMITS = (0.05, NO_LIMIT, NO_LIMIT, NO_LIMIT)
FLAGGER = Policy("Flagger, as documented", 60, 5, None, 0.99)
FLAGGER_LIMITS = (0.01, NO_LIMIT, 0.5, NO_LIMIT)
CALIBRATED_STEPS_S = (7200.0, 600.0)
ARGO_CALIBRATED = Policy("Argo", 300, 4, CALIBRATED_STEPS_S)
FLAGGER_CALIBRATED = Policy("Flagger", 60, 5, CALIBRATED_STEPS_S)


@dataclass(frozen=True)
class Windows:
    """Measurements of one rollout, in order.

    Attributes:
        values: windows x signals; a signal without data is 0.
        exposed: requests to the candidate until each window's end.
        ends_s: end of each window, in seconds.
    """

    values: Floats
    exposed: Floats
    ends_s: Floats


def measure(traffic: Traffic, policy: Policy) -> Windows:
    """Measure a candidate that stays at each share for the policy's time."""
    assert policy.step_s
    values, exposed, ends = list[Floats](), list[int](), list[float]()
    start = 0.0
    for share, seconds in zip(SHARES, policy.step_s, strict=True):
        for _ in range(round(seconds / policy.window_s)):
            measured, requests = _measure(traffic, share, start, policy)
            start += policy.window_s
            values.append(measured)
            exposed.append(requests)
            ends.append(start)
    return Windows(np.array(values), np.cumsum(exposed, dtype=float), np.array(ends))


def _measure(traffic: Traffic, share: float, start: float, policy: Policy) -> tuple[Floats, int]:
    """Return the values of one window, and its number of requests to the candidate."""
    first, last = traffic.time.searchsorted([start, start + policy.window_s])
    chosen = np.flatnonzero(traffic.place[first:last] < share) + first
    if not len(chosen):
        return np.zeros(SIGNALS), 0
    failed = traffic.failed[1, chosen]
    answered = chosen[~failed]
    if not len(answered):
        return np.array([1.0, 0.0, 0.0, 0.0]), len(chosen)
    rated = answered[traffic.rated[answered]]
    times = np.sort(traffic.first_token_s[1, answered])
    percentile = times[int(np.ceil(policy.percentile * len(times))) - 1]
    bad = traffic.bad[1, rated].mean() if len(rated) else 0.0
    return np.array([failed.mean(), traffic.invalid[1, answered].mean(), percentile, bad]), len(chosen)


def decide(windows: Windows, policy: Policy, limits: Floats) -> Decision:
    """Return the decision of a policy with fixed times at each share."""
    failures = (windows.values > limits).any(axis=1).cumsum()
    reached = np.flatnonzero(failures >= policy.failures)
    if len(reached):
        return Decision(End.ROLLED_BACK, int(windows.exposed[reached[0]]), float(windows.ends_s[reached[0]]))
    return Decision(End.FULL, int(windows.exposed[-1]), float(windows.ends_s[-1]))


def advance_on_success(traffic: Traffic, policy: Policy, limits: Floats) -> Decision:
    """Return the decision of a policy that advances with each successful measurement."""
    start, failures, exposed = 0.0, 0, 0
    for share in SHARES:
        while True:
            values, requests = _measure(traffic, share, start, policy)
            start += policy.window_s
            exposed += requests
            if not (values > limits).any():
                break
            failures += 1
            if failures >= policy.failures:
                return Decision(End.ROLLED_BACK, exposed, start)
    return Decision(End.FULL, exposed, start)


def calibrate(equal: list[Windows], policy: Policy, wrong: float) -> Floats:
    """Return limits that roll back at most this share of the given rollouts of equal candidates.

    A rollout is rolled back if enough windows exceed a limit. Each signal's limit is therefore a quantile of the value
    that this number of windows reaches. The same quantile is used for all signals: the lowest one that keeps the share.
    """
    reached = np.array([np.sort(windows.values, axis=0)[-policy.failures] for windows in equal])
    for quantile in 1 - wrong * np.array([1.0, 0.75, 0.5, 0.375, 0.25, 0.125, 0.0]):
        limits: Floats = np.quantile(reached, quantile, axis=0, method="higher")
        if np.mean([decide(windows, policy, limits).end is End.ROLLED_BACK for windows in equal]) <= wrong:
            return limits
    largest: Floats = np.max([windows.values.max(axis=0) for windows in equal], axis=0)
    return largest
