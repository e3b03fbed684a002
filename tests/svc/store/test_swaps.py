"""Tests that the journal records the steps and the outcome of a swap."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine as Store

from serving.rollout.served import Began, begin_serving
from svc.store.desired import Desired
from svc.store.leases import remove_server, report_server
from svc.store.swaps import (
    SwapKind,
    SwapOutcome,
    SwapResult,
    add_step,
    begin_swap,
    end_lost_swaps,
    end_swap,
    failed_elsewhere,
    find_swap,
    last_queued_s,
    last_swap,
    server_swaps,
    unfinished_swaps,
)
from svc.version import Format, Target, VersionId
from tests.new_store import new_store


def desired(number: int, generation: int, name: str = "tiny") -> Desired:
    return Desired(Target(VersionId(name, number), Format.GPTQ), None, generation)


def test_new_store_has_no_swaps(store: Store) -> None:
    assert find_swap(store, "tiny") is None


def test_stored_steps_of_a_swap_can_be_read_before_the_swap_ends(store: Store) -> None:
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


def test_last_swap_is_found_by_model_name(store: Store) -> None:
    begin_swap(store, desired(2, 5))
    last = begin_swap(store, desired(3, 6))
    begin_swap(store, desired(9, 1, name="other"))
    found = find_swap(store, "tiny")
    assert found is not None
    assert found.id == last


def test_queueing_time_is_read_from_the_last_successful_in_place_swap_to_the_given_version(store: Store) -> None:
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


def test_swap_is_found_by_the_generation_of_its_desired_state(store: Store) -> None:
    first = begin_swap(store, desired(2, 5))
    begin_swap(store, desired(3, 6))
    found = find_swap(store, "tiny", generation=5)
    assert found is not None
    assert found.id == first
    assert find_swap(store, "tiny", generation=7) is None


def test_steps_of_different_swaps_are_stored_separately(store: Store) -> None:
    first, second = begin_swap(store, desired(2, 5)), begin_swap(store, desired(3, 6))
    add_step(store, second, "of the second")
    add_step(store, first, "of the first")
    found = find_swap(store, "tiny")
    assert found is not None
    assert found.steps == ("of the second",)


@pytest.fixture
def shared(postgresql_store: Store) -> Store:
    """Return a store that the servers `a` and `b` use."""
    for server in ("a", "b"):
        report_server(postgresql_store, server, f"{server}:8000", [])
    return postgresql_store


def test_server_resumes_only_its_own_swap(shared: Store) -> None:
    first = begin_swap(shared, desired(2, 5), server="a")
    second = begin_swap(shared, desired(2, 5), server="b")
    assert first != second
    assert begin_swap(shared, desired(2, 5), server="a") == first
    found = [find_swap(shared, "tiny", server=server) for server in ("a", "b")]
    assert [swap.id for swap in found if swap] == [first, second]


def test_unfinished_swaps_include_only_swaps_of_running_servers(any_store: Store) -> None:
    begin_swap(any_store, desired(2, 5))
    begin_swap(any_store, desired(3, 5), server="a")
    is_sqlite = any_store.dialect.name == "sqlite"
    report_server(any_store, "a", "a:8000", [])
    assert [swap.target.version.number for swap in unfinished_swaps(any_store, "tiny")] == [2 if is_sqlite else 3]


def test_unfinished_swaps_of_dead_servers_are_ended(shared: Store) -> None:
    for server in ("a", "b"):
        begin_swap(shared, desired(2, 5), server=server)
    remove_server(shared, "b")
    end_lost_swaps(shared, desired(2, 5), "c:8000", SwapResult(SwapOutcome.SUCCEEDED), "it stopped")
    swaps = {each.server: each.swap and each.swap.result for each in server_swaps(shared, "tiny", 5)}
    assert swaps == {"a": None, "b": SwapResult(SwapOutcome.FAILED, "it stopped")}


def test_swap_on_a_killed_server_succeeds_if_the_server_restarts_with_the_new_version(shared: Store) -> None:
    begin_swap(shared, desired(2, 5), server="b")
    report_server(shared, "b2", "b:8000", [])
    end_lost_swaps(shared, desired(2, 5), "b:8000", SwapResult(SwapOutcome.SUCCEEDED), "it stopped")
    swap = last_swap(shared, "tiny", server="b2")
    assert swap is not None
    assert (swap.result, swap.steps) == (
        SwapResult(SwapOutcome.SUCCEEDED),
        ("the server started again with tiny@2 (gptq)",),
    )


def test_server_has_no_last_swap_if_only_another_running_server_began_one(shared: Store) -> None:
    begin_swap(shared, desired(2, 5), server="b")
    assert last_swap(shared, "tiny", server="a") is None


def test_swap_progress_lists_the_only_server_even_before_its_swap_begins(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    (before,) = server_swaps(store, "tiny", 5)
    begin_swap(store, desired(2, 5))
    (begun,) = server_swaps(store, "tiny", 5)
    begin_swap(store, desired(3, 6))
    (overtaken,) = server_swaps(store, "tiny", 4)
    assert (before.swap, before.running, before.later) == (None, True, None)
    assert begun.swap and begun.swap.generation == 5
    assert (overtaken.swap, overtaken.later) == (None, desired(3, 6).target)


def test_swap_progress_omits_servers_that_started_with_the_new_version(shared: Store) -> None:
    report_server(shared, "c", "c:8000", [])
    begin_serving(shared, desired(1, 4), Began.START, server="a")
    begin_serving(shared, desired(2, 5), Began.START, server="b")  # it started with the version
    swap = begin_swap(shared, desired(2, 5), server="c")
    found = [(each.address, each.running, each.swap and each.swap.id) for each in server_swaps(shared, "tiny", 5)]
    assert found == [("a:8000", True, None), ("c:8000", True, swap)]


@pytest.mark.parametrize(
    ("outcome", "fails"),
    [(SwapOutcome.REFUSED, True), (SwapOutcome.CANCELLED, False), (SwapOutcome.SUCCEEDED, False)],
)
def test_version_counts_as_failed_if_the_last_swap_to_it_on_another_running_server_failed(
    shared: Store, outcome: SwapOutcome, fails: bool
) -> None:
    end_swap(shared, begin_swap(shared, desired(2, 5), server="b"), SwapResult(outcome, "why"))
    tried = desired(2, 5).target
    assert (failed_elsewhere(shared, tried, server="a"), failed_elsewhere(shared, tried, server="b")) == (fails, False)
    remove_server(shared, "b")
    assert not failed_elsewhere(shared, tried, server="a")
