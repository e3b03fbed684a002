"""Tests the simulated engines against results that are known otherwise."""

import statistics

import pytest

from serving.sizing.simulation import Limits, Request, Workload, simulate, simulate_rollout
from tests.serving.sizing.times import make_times


def test_latency_of_a_single_request_is_its_prompt_time_plus_one_step_per_token() -> None:
    request = Request(5.0, prompt=100, answer=20)
    simulate([request], 1, make_times(overhead_s=0.5), Limits(8))
    assert request.first - request.arrived == pytest.approx(0.5 + 0.01 + 100 * 0.0001)
    assert request.last - request.first == pytest.approx(19 * 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("utilization", [0.3, 0.6, 0.85])
def test_mean_wait_matches_queueing_theory_when_requests_run_one_at_a_time(utilization: float) -> None:
    times = make_times(token_s=0.0)
    service_s = 20 * 0.01
    requests = Workload(utilization / service_s, prompt=100, answer=20).requests(15_000)
    answered = simulate(requests, 1, times, Limits(sequences=1))
    wait_s = statistics.fmean(each.last - each.arrived for each in answered) - service_s
    # M/D/1, Pollaczek-Khinchine. An arriving request also waits for the end of a step, never longer than 0.01 s.
    expected = utilization * service_s / (2 * (1 - utilization))
    assert expected * 0.85 <= wait_s <= expected * 1.15 + 0.01


def test_concurrent_requests_are_decoded_in_the_same_steps() -> None:
    together = [Request(0.0, prompt=1, answer=21) for _ in range(8)]
    simulate(together, 1, make_times(token_s=0.0), Limits(8))
    assert max(each.last for each in together) == pytest.approx(21 * 0.01)


def test_request_waits_while_the_kv_cache_has_no_space_for_it() -> None:
    together = [Request(0.0, prompt=100, answer=20) for _ in range(2)]
    simulate(together, 1, make_times(token_s=0.0), Limits(8, cache_tokens=200))
    assert together[1].first > together[0].last


def test_long_prompt_is_processed_in_several_steps() -> None:
    request = Request(0.0, prompt=5000, answer=1)
    simulate([request], 1, make_times(), Limits(8))
    assert request.last == pytest.approx(3 * 0.01 + 5000 * 0.0001)


@pytest.mark.slow
def test_simulated_answer_lengths_have_the_requested_mean_and_spread() -> None:
    lengths = [each.answer for each in Workload(1.0, 100, 1000, spread=0.5).requests(20_000)]
    assert statistics.fmean(lengths) == pytest.approx(1000, rel=0.02)
    assert statistics.stdev(lengths) == pytest.approx(500, rel=0.05)


def test_requests_wait_for_a_weight_reload_when_there_is_only_one_replica() -> None:
    requests = Workload(20.0, 10, 5).requests(2000)
    during, seconds = simulate_rollout(requests, 1, make_times(), Limits(8), reload_s=3.0)
    assert 3.0 <= seconds < 4.0
    assert 2.5 < max(each.first - each.arrived for each in during) < 4.0


def test_no_request_waits_for_a_reload_when_a_second_replica_has_capacity() -> None:
    requests = Workload(20.0, 10, 5).requests(2000)
    during, seconds = simulate_rollout(requests, 2, make_times(), Limits(8), reload_s=3.0)
    assert 6.0 <= seconds < 8.0
    assert max(each.first - each.arrived for each in during) < 0.2
