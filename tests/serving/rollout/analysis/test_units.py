"""Each unit is observed once per step, for a fixed time."""

from hypothesis import given
from hypothesis import strategies as st

from serving.rollout.analysis.units import WINDOW_S, Arm, Request, Unit, Units

PRODUCTION, CANDIDATE = Arm.PRODUCTION, Arm.CANDIDATE
AFTER = 2 * WINDOW_S


def closed(units: Units, *requests: Request) -> list[Unit]:
    """Return the units that close while these requests are added."""
    return [unit for request in requests for unit in units.add(request)]


def test_request_without_a_user_or_conversation_is_a_separate_observation() -> None:
    units = Units()
    failed = Request(None, CANDIDATE, 1.0, failed=True, valid=False)
    good = Request(None, PRODUCTION, 1.0, valid=True, first_token_s=0.2)
    assert closed(units, failed, good) == [Unit(CANDIDATE, 1.0, 1.0, None), Unit(PRODUCTION, 0.0, 0.0, 0.2)]


def test_observation_of_a_user_has_the_mean_rates_and_the_median_latency_of_the_users_requests() -> None:
    units = Units()
    requests = [
        Request("ada", CANDIDATE, 0.0, failed=True),
        Request("ada", CANDIDATE, 1.0, valid=True, first_token_s=1.0),
        Request("ada", CANDIDATE, 2.0, valid=False, first_token_s=5.0),
        Request("ada", CANDIDATE, 3.0, first_token_s=2.0),
    ]
    assert closed(units, *requests) == []
    assert closed(units, Request(None, PRODUCTION, WINDOW_S))[0] == Unit(CANDIDATE, 0.25, 0.5, 2.0)


def test_requests_are_ignored_after_the_observation_window_of_their_user_has_ended() -> None:
    units = Units()
    closed(units, Request("ada", CANDIDATE, 0.0))
    late = [Request("ada", CANDIDATE, WINDOW_S + second, failed=True) for second in range(100)]
    assert closed(units, *late, Request("ada", CANDIDATE, 1e6)) == [Unit(CANDIDATE, 0.0, None, None)]


def test_user_already_counted_for_the_candidate_is_not_counted_again_in_later_rollout_steps() -> None:
    units = Units()
    closed(units, Request("moved", PRODUCTION, 0.0), Request("stays", CANDIDATE, 0.0))
    assert [unit.arm for unit in units.start_step()] == [PRODUCTION, CANDIDATE]
    closed(units, Request("moved", CANDIDATE, 1.0, failed=True), Request("stays", CANDIDATE, 1.0, failed=True))
    assert units.start_step() == [Unit(CANDIDATE, 1.0, None, None)]
    assert closed(units, Request("moved", CANDIDATE, 2.0)) == []
    assert units.start_step() == []


def test_request_is_ignored_if_its_user_was_first_observed_on_the_other_version() -> None:
    units = Units()
    closed(units, Request("ada", PRODUCTION, 0.0), Request("ada", CANDIDATE, 1.0, failed=True))
    assert units.start_step() == [Unit(PRODUCTION, 0.0, None, None)]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0, 50), st.booleans())))
def test_users_are_observed_exactly_once_in_the_order_of_their_first_requests(
    traffic: list[tuple[str, float, bool]],
) -> None:
    units, now, requests = Units(), 0.0, []
    for name, wait, failed in traffic:
        now += wait
        requests.append(Request(name, PRODUCTION, now, failed, first_token_s=float(ord(name))))
    found = [*closed(units, *requests), *units.start_step()]
    names = dict.fromkeys(request.unit for request in requests)
    assert [unit.first_token_s for unit in found] == [float(ord(name)) for name in names if name]
