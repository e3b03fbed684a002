"""Tests that the journal records the steps and the outcome of a swap."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine as Store

from svc.store.desired import Desired
from svc.store.swaps import (
    SwapKind,
    SwapOutcome,
    SwapResult,
    add_step,
    begin_swap,
    end_swap,
    find_swap,
    last_queued_s,
)
from svc.version import Format, Target, VersionId


def desired(number: int, generation: int, name: str = "tiny") -> Desired:
    return Desired(Target(VersionId(name, number), Format.GPTQ), None, generation)


def test_new_store_has_no_swaps(store: Store) -> None:
    assert find_swap(store, "tiny") is None


def test_running_swap_has_its_steps_and_no_outcome(store: Store) -> None:
    swap = begin_swap(store, desired(2, 5))
    add_step(store, swap, "files match")
    add_step(store, swap, "queueing new requests")
    found = find_swap(store, "tiny")
    assert found is not None
    assert (found.id, found.generation, found.result) == (swap, 5, None)
    assert found.target == desired(2, 5).target
    assert found.steps == ("files match", "queueing new requests")


def test_swap_start_time_is_timezone_aware(store: Store) -> None:
    begin_swap(store, desired(2, 5))
    found = find_swap(store, "tiny")
    assert found is not None
    assert abs(datetime.now(UTC) - found.started_at) < timedelta(minutes=1)


@pytest.mark.parametrize("outcome", SwapOutcome)
def test_swap_result_round_trips_for_every_outcome(store: Store, outcome: SwapOutcome) -> None:
    swap = begin_swap(store, desired(2, 5))
    result = SwapResult(outcome, "why", 1.5, 3, 7, SwapKind.ROLLING, 2.5)
    end_swap(store, swap, result)
    found = find_swap(store, "tiny")
    assert found is not None
    assert found.result == result


def test_last_swap_of_a_name_is_found(store: Store) -> None:
    begin_swap(store, desired(2, 5))
    last = begin_swap(store, desired(3, 6))
    begin_swap(store, desired(9, 1, name="other"))
    found = find_swap(store, "tiny")
    assert found is not None
    assert found.id == last


def test_queued_time_is_that_of_the_last_successful_in_place_swap_to_the_version(store: Store) -> None:
    results = [
        SwapResult(SwapOutcome.SUCCEEDED, None, 1.5, kind=SwapKind.INPLACE),
        SwapResult(SwapOutcome.RESTORED, "why", 2.5, kind=SwapKind.INPLACE),
        SwapResult(SwapOutcome.SUCCEEDED, None, 3.5, kind=SwapKind.ROLLING),
    ]
    for generation, result in enumerate(results):
        end_swap(store, begin_swap(store, desired(2, generation)), result)
    end_swap(store, begin_swap(store, desired(3, 9)), SwapResult(SwapOutcome.SUCCEEDED, None, 4.5))
    assert last_queued_s(store, desired(2, 0).target) == 1.5
    assert last_queued_s(store, desired(3, 0).target) is None


def test_swap_is_found_by_generation(store: Store) -> None:
    first = begin_swap(store, desired(2, 5))
    begin_swap(store, desired(3, 6))
    found = find_swap(store, "tiny", generation=5)
    assert found is not None
    assert found.id == first
    assert find_swap(store, "tiny", generation=7) is None


def test_swap_steps_belong_to_their_swap(store: Store) -> None:
    first, second = begin_swap(store, desired(2, 5)), begin_swap(store, desired(3, 6))
    add_step(store, second, "of the second")
    add_step(store, first, "of the first")
    found = find_swap(store, "tiny")
    assert found is not None
    assert found.steps == ("of the second",)
