"""Simulated traffic has the declared rates, and users keep their arm."""

import numpy as np
import pytest

from benchmarks.rollout.traffic import BAD, EQUAL, SINGLE, Kind, Shape, Version, generate

HOUR_S = 3600.0


@pytest.mark.parametrize("shape", [Shape.INDEPENDENT, Shape.SESSIONS])
def test_generated_traffic_has_the_failure_rates_configured_for_each_version(shape: Shape) -> None:
    candidate = Version(errors=0.03, invalid=0.1, bad=0.4)
    traffic = generate(Kind("bad", candidate, shape), 2 * HOUR_S, seed=1)
    for row, version in enumerate((Version(), candidate)):
        assert traffic.failed[row].mean() == pytest.approx(version.errors, rel=0.25)
        assert traffic.invalid[row].mean() == pytest.approx(version.invalid, rel=0.25)
        assert traffic.bad[row].mean() == pytest.approx(version.bad, rel=0.25)


def test_slow_candidate_has_higher_latency_on_every_request() -> None:
    traffic = generate(Kind("slow", Version(slower=1.5)), 60.0, seed=2)
    np.testing.assert_allclose(traffic.first_token_s[1], 1.5 * traffic.first_token_s[0])


@pytest.mark.parametrize("kind", EQUAL, ids=str)
def test_simulated_traffic_is_sorted_by_time_and_gives_equally_good_versions_identical_results(kind: Kind) -> None:
    traffic = generate(kind, HOUR_S, seed=3)
    for results in (traffic.failed, traffic.invalid, traffic.first_token_s, traffic.bad):
        np.testing.assert_array_equal(results[0], results[1])
    assert (np.diff(traffic.time) >= 0).all()
    assert kind.equal
    assert not any(bad.equal for bad in BAD)


def test_session_has_2_to_20_requests_with_the_same_user_hash() -> None:
    traffic = generate(Kind("sessions", shape=Shape.SESSIONS), HOUR_S, seed=4)
    users, counts = np.unique(traffic.unit, return_counts=True)
    assert counts.min() >= 2
    assert counts.max() <= 20
    for user in users[:50]:
        assert len(set(traffic.place[traffic.unit == user])) == 1


def test_heavy_client_sends_30_percent_of_the_requests() -> None:
    traffic = generate(Kind("heavy", shape=Shape.HEAVY), HOUR_S, seed=5)
    heavy = traffic.unit != SINGLE
    assert heavy.mean() == pytest.approx(0.3, abs=0.02)
    assert len(set(traffic.place[heavy])) == 1
