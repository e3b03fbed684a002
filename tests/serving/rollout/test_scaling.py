"""Tests the decision about the number of replicas, also on a day with the bursts of a public trace."""

import heapq
import math
import random
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from serving.rollout.scaling import MEAN_S, ScalingPolicy
from svc.settings.engine import ReplicaRange

TRACE = Path(__file__).parents[2] / "data" / "traces" / "azure_2023_conversation_minutes.csv"
DAY_S, STEP_S = 86_400, 5
SEQUENCES, ANSWER_S, START_S = 16, 10.0, 120
HOLD_S = ReplicaRange(max=8).remove_after_s
MOST = 8


def make_policy(least: int = 1, most: int = MOST, hold_s: float = HOLD_S) -> ScalingPolicy:
    return ScalingPolicy(least, most, sequences=10, hold_s=hold_s)


def observe(policy: ScalingPolicy, requests: int, replicas: int, seconds: float, start: float = 0.0) -> int:
    """Observe a constant load for a time, and return the last decision."""
    wanted = replicas
    for tick in range(int(seconds / STEP_S) + 1):
        wanted = policy.wanted(start + tick * STEP_S, requests, replicas)
    return wanted


def test_replicas_are_added_when_the_load_stays_above_the_target_per_replica() -> None:
    assert observe(make_policy(), requests=20, replicas=1, seconds=MEAN_S) == 3


def test_short_load_burst_does_not_add_a_replica() -> None:
    policy = make_policy()
    observe(policy, requests=2, replicas=1, seconds=60)
    assert policy.wanted(65, 20, 1) == 1


def test_replica_is_removed_only_after_the_load_has_been_low_for_a_while() -> None:
    policy = make_policy()
    observe(policy, requests=25, replicas=4, seconds=60)
    assert observe(policy, requests=5, replicas=4, seconds=HOLD_S - 60, start=65) == 4
    assert observe(policy, requests=5, replicas=4, seconds=120, start=65 + HOLD_S) == 3


def test_replica_is_removed_after_the_configured_time_of_low_load() -> None:
    policy = make_policy(hold_s=120)
    observe(policy, requests=25, replicas=4, seconds=60)
    assert observe(policy, requests=5, replicas=4, seconds=100, start=65) == 4
    assert observe(policy, requests=5, replicas=4, seconds=60, start=170) == 3


def test_load_between_the_scale_down_and_scale_up_limits_does_not_change_the_number_of_replicas() -> None:
    # Two replicas get up to 14 requests; one would be enough for at most 5.
    assert {observe(make_policy(), count, 2, 2 * HOLD_S) for count in (6, 10, 14)} == {2}


@pytest.mark.parametrize(("requests", "wanted"), [(0, 2), (1000, 4)])
def test_number_of_replicas_stays_within_its_limits(requests: int, wanted: int) -> None:
    policy, replicas = make_policy(least=2, most=4), 3
    for tick in range(800):
        replicas = policy.wanted(tick * STEP_S, requests, replicas)
    assert replicas == wanted


def test_no_replica_is_removed_soon_after_the_scaling_policy_is_reset() -> None:
    policy = make_policy()
    observe(policy, requests=0, replicas=4, seconds=HOLD_S - 10)
    policy.reset()
    assert observe(policy, requests=0, replicas=4, seconds=60, start=HOLD_S) == 4


@dataclass
class Day:
    """A simulated day.

    Attributes:
        waits: seconds that each request waited for a replica.
        changes: number of decisions that changed the number of replicas.
        replica_hours: hours for which replicas ran or started.
    """

    waits: list[int] = field(default_factory=list)
    changes: int = 0
    replica_hours: float = 0.0


def simulate_day(seed: int, scale: float = 1.0) -> Day:
    """Simulate a day whose load rises tenfold from 4:00 to 16:00, with the trace's bursts in every hour."""
    lines = TRACE.read_text("utf-8").splitlines()
    minutes = [int(line.split(",")[1]) for line in lines if line[0].isdigit()][:-1]
    rng, day, policy = random.Random(seed), Day(), ScalingPolicy(1, MOST, SEQUENCES, HOLD_S)
    replicas = ready = 1
    starts, ends, queue = deque[int](), list[float](), deque[int]()
    for now in range(DAY_S):
        level = 0.1 + 0.9 * (0.5 - 0.5 * math.cos(2 * math.pi * (now / 3600 - 4) / 24))
        queue.extend([now] * _poisson(rng, scale * level * minutes[now // 60 % len(minutes)] / 60))
        while starts and starts[0] <= now:
            starts.popleft()
            ready += 1
        while ends and ends[0] <= now:
            heapq.heappop(ends)
        while queue and len(ends) < ready * SEQUENCES:
            day.waits.append(now - queue.popleft())
            heapq.heappush(ends, now + rng.expovariate(1 / ANSWER_S))
        if now % STEP_S == 0:
            wanted = policy.wanted(now, len(ends) + len(queue), replicas)
            day.changes += wanted != replicas
            starts.extend([now + START_S] * (wanted - replicas))
            if wanted < replicas and starts:
                starts.pop()
            elif wanted < replicas:
                ready -= 1
            replicas = wanted
        day.replica_hours += replicas / 3600
    return day


def _poisson(rng: random.Random, mean: float) -> int:
    count, product, limit = 0, rng.random(), math.exp(-mean)
    while product > limit:
        count, product = count + 1, product * rng.random()
    return count


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_scaling_over_a_simulated_day_saves_replica_hours_and_keeps_waits_short_and_changes_rare(scale: float) -> None:
    day = simulate_day(seed=1, scale=scale)
    waits = sorted(day.waits)
    assert day.changes <= 40
    assert waits[int(0.95 * len(waits))] <= 1
    assert waits[-1] <= 60
    assert day.replica_hours < 0.75 * 24 * MOST
