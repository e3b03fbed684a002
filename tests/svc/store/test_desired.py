"""Tests that, of two changes based on the same state, one wins and the other is rejected."""

import threading
from dataclasses import replace

import pytest
from sqlalchemy import Engine as Store

from svc.errors import BusyError
from svc.store.audit import Action, AuditEntry, read_events
from svc.store.desired import Desired, change_desired, desired_names, read_desired
from svc.version import Format, Target, VersionId
from tests.builders.actors import ALICE


def target(number: int, format: Format = Format.GPTQ, name: str = "tiny") -> Target:
    return Target(VersionId(name, number), format)


def test_new_store_has_no_desired_version(store: Store) -> None:
    assert read_desired(store, "tiny") is None
    assert desired_names(store) == []


def test_first_desired_state_has_generation_1(store: Store) -> None:
    made = change_desired(store, None, target(1), None)
    assert made == read_desired(store, "tiny") == Desired(target(1), None, 1)


def test_desired_state_change_stores_the_previous_target(store: Store) -> None:
    first = change_desired(store, None, target(1, Format.MERGED), None)
    change_desired(store, first, target(2), first.target)
    assert read_desired(store, "tiny") == Desired(target(2), target(1, Format.MERGED), 2)


def test_desired_state_change_can_clear_the_previous_target(store: Store) -> None:
    first = change_desired(store, None, target(1), target(3))
    change_desired(store, first, target(2), None)
    assert read_desired(store, "tiny") == Desired(target(2), None, 2)


def test_reason_for_a_forced_promotion_is_kept_until_the_desired_state_changes(store: Store) -> None:
    first = change_desired(store, None, target(1), None, forced="a test")
    assert read_desired(store, "tiny") == first == Desired(target(1), None, 1, "a test")
    change_desired(store, first, target(2), first.target)
    assert read_desired(store, "tiny") == Desired(target(2), target(1), 2)


def test_desired_states_of_different_model_names_are_independent(store: Store) -> None:
    change_desired(store, None, target(1), None)
    change_desired(store, None, target(7, name="other"), None)
    change_desired(store, read_desired(store, "tiny"), target(2), None)
    assert desired_names(store) == ["other", "tiny"]
    assert read_desired(store, "tiny") == Desired(target(2), None, 2)
    assert read_desired(store, "other") == Desired(target(7, name="other"), None, 1)


def test_desired_state_change_based_on_a_stale_read_is_rejected(store: Store) -> None:
    seen = change_desired(store, None, target(1), None)
    change_desired(store, seen, target(2), seen.target)
    with pytest.raises(BusyError, match="another user has just changed the desired version of tiny"):
        change_desired(store, seen, target(3), seen.target)
    assert read_desired(store, "tiny") == Desired(target(2), target(1), 2)


def test_initial_desired_state_is_rejected_if_a_state_already_exists(store: Store) -> None:
    change_desired(store, None, target(1), None)
    with pytest.raises(BusyError):
        change_desired(store, None, target(2), None)
    assert read_desired(store, "tiny") == Desired(target(1), None, 1)


def test_desired_state_change_is_rejected_if_the_expected_state_does_not_exist(store: Store) -> None:
    with pytest.raises(BusyError):
        change_desired(store, Desired(target(1), None, 1), target(2), None)
    assert read_desired(store, "tiny") is None


def test_desired_state_change_based_on_a_stale_read_is_rejected_even_if_the_values_are_equal_again(
    store: Store,
) -> None:
    first = change_desired(store, None, target(1), None)
    second = change_desired(store, first, target(2), first.target)
    back = change_desired(store, second, target(1), None)
    assert replace(back, generation=1) == first
    with pytest.raises(BusyError):
        change_desired(store, first, target(3), first.target)


@pytest.mark.parametrize("exists", [False, True])
def test_exactly_one_of_many_concurrent_desired_state_changes_succeeds(store: Store, exists: bool) -> None:
    seen = change_desired(store, None, target(1), None) if exists else None
    outcomes: list[Desired | BusyError] = []
    start = threading.Barrier(6)

    def change(number: int) -> None:
        start.wait(5)
        try:
            outcomes.append(change_desired(store, seen, target(number), None))
        except BusyError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=change, args=(number,)) for number in range(2, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [outcome for outcome in outcomes if isinstance(outcome, Desired)]
    assert len(outcomes) == 6
    assert won == [read_desired(store, "tiny")]


def test_desired_target_is_printed_as_version_and_format() -> None:
    assert str(target(3, Format.MERGED)) == "tiny@3 (merged)"


PROMOTION = AuditEntry(Action.PROMOTE, "tiny@2", ALICE, "it is better")


def test_desired_state_change_is_audited_with_its_actor_and_previous_state(store: Store) -> None:
    first = change_desired(store, None, target(1), None)
    change_desired(store, first, target(2), first.target, entry=PROMOTION)
    (event,) = read_events(store, newest=9)
    assert (event.action, event.subject, event.reason) == ("promote", "tiny@2", "it is better")
    assert event.details == {"before": "tiny@1 (gptq)", "forced": False, "format": "gptq", "generation": 2}


def test_rejected_desired_state_change_is_not_audited(store: Store) -> None:
    change_desired(store, None, target(1), None)
    with pytest.raises(BusyError):
        change_desired(store, None, target(2), None, entry=PROMOTION)
    assert read_events(store, newest=9) == []
