"""Tests that drift items are read as stored, deleted with their requests, and limited in number."""

from collections.abc import Sequence
from datetime import timedelta

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import update

from serving.audit.erasure import forget_requests, of_user
from svc.store import drift_items
from svc.store.drift_items import StoredItem, add_items, item_ids, prune_items, read_items, read_items_with
from svc.store.requests import add_requests, hash_user, prune_requests
from svc.store.tables import RequestRow
from svc.version import Format, Target, VersionId
from tests.builders.drift_items import item
from tests.builders.requests import NOON, PLENTY, RECORD, TARGET, fill

OTHERS = [Target(VersionId("tiny", 1), Format.GPTQ), Target(VersionId("tiny", 2), Format.MERGED)]


def add(store: Store, count: int, target: Target = TARGET) -> list[int]:
    """Add drift items for stored requests, and return the ids of all items."""
    add_items(store, target, [item(f"req-{number}", characters=number) for number in range(count)])
    return item_ids(store, target)


def requests_of(found: Sequence[StoredItem]) -> list[str]:
    return [stored.item.request_id for stored in found]


def test_stored_drift_item_round_trips(store: Store) -> None:
    add_requests(store, [RECORD._replace(user_hash=hash_user("a@b.de"))])
    one = item("req-1")
    assert add_items(store, TARGET, [one]) == 1
    (found,) = read_items(store, TARGET, after=0, newest=9)
    read = found.item
    assert (read.request_id, read.started_at, read.conversation) == ("req-1", NOON, one.conversation)
    assert (read.prompt, read.answer) == (one.prompt, one.answer)
    for name in ("topic", "wanted", "words"):
        assert getattr(read, name).dtype == getattr(one, name).dtype
        assert getattr(read, name).tolist() == getattr(one, name).tolist()
    assert (found.logprob, found.client) == (None, hash_user("a@b.de"))


def test_drift_item_includes_the_log_probability_of_its_scored_answer(store: Store) -> None:
    fill(store, 1)
    add(store, 1)
    with store.begin() as connection:
        connection.execute(update(RequestRow).values(logprob=-0.25))
    assert [found.logprob for found in read_items(store, TARGET, after=0, newest=9)] == [-0.25]


def test_newest_drift_items_above_a_given_id_are_read_in_order(store: Store) -> None:
    fill(store, 6)
    ids = add(store, 6)
    assert requests_of(read_items(store, TARGET, after=ids[1], newest=3)) == ["req-3", "req-4", "req-5"]
    assert requests_of(read_items(store, TARGET, after=ids[3], newest=3)) == ["req-4", "req-5"]
    assert item_ids(store, TARGET, after=ids[3]) == ids[4:]


def test_drift_items_are_read_in_id_order_and_missing_ids_are_skipped(store: Store) -> None:
    fill(store, 3)
    ids = add(store, 3)
    assert requests_of(read_items_with(store, TARGET, [ids[2], 999, ids[0]])) == ["req-0", "req-2"]


@pytest.mark.parametrize("other", OTHERS)
def test_drift_items_of_a_different_version_or_format_are_neither_read_nor_pruned(store: Store, other: Target) -> None:
    fill(store, 2)
    ids = add(store, 2)
    assert read_items(store, other, after=0, newest=9) == read_items_with(store, other, ids) == []
    assert item_ids(store, other) == []
    assert prune_items(store, other, (), newest=0) == 0
    assert item_ids(store, TARGET) == ids


def test_drift_item_of_a_deleted_request_is_not_stored(store: Store) -> None:
    fill(store, 1)
    assert add_items(store, TARGET, [item("req-0"), item("forgotten")]) == 1
    assert add_items(store, TARGET, [item("forgotten")]) == add_items(store, TARGET, []) == 0
    assert requests_of(read_items(store, TARGET, after=0, newest=9)) == ["req-0"]


def test_adding_a_second_drift_item_for_a_request_keeps_the_first_item(store: Store) -> None:
    fill(store, 2)
    add(store, 1)
    assert add_items(store, TARGET, [item("req-0", characters=99), item("req-1")]) == 1
    first, second = read_items(store, TARGET, after=0, newest=9)
    assert (first.item.prompt["characters"], second.item.request_id) == (0, "req-1")


def test_drift_item_is_deleted_with_its_expired_request(store: Store) -> None:
    fill(store, 3)
    add(store, 3)
    prune_requests(store, before=NOON - timedelta(minutes=1), max_bytes=PLENTY)
    assert requests_of(read_items(store, TARGET, after=0, newest=9)) == ["req-1", "req-2"]


def test_drift_item_is_deleted_with_its_request_when_user_data_is_erased(store: Store) -> None:
    add_requests(store, [RECORD._replace(request_id=f"req-{n}", user_hash=hash_user(f"u{n}")) for n in range(2)])
    add(store, 2)
    assert forget_requests(store, of_user("u0")).requests == 1
    assert requests_of(read_items(store, TARGET, after=0, newest=9)) == ["req-1"]


def test_drift_item_ids_are_not_reused_after_all_items_are_deleted(store: Store) -> None:
    fill(store, 2)
    ids = add(store, 2)
    prune_items(store, TARGET, (), newest=0)
    assert min(add(store, 2)) > max(ids)


def test_pruning_keeps_the_newest_and_protected_drift_items(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift_items, "_DELETED_TOGETHER", 2)
    fill(store, 8)
    ids = add(store, 8)
    add_requests(store, [RECORD._replace(request_id=f"other-{n}") for n in range(8)])
    add_items(store, OTHERS[0], [item(f"other-{n}") for n in range(8)])
    assert prune_items(store, TARGET, {ids[1], ids[7], 999}, newest=2) == 5
    assert item_ids(store, TARGET) == [ids[1], ids[6], ids[7]]
    assert len(item_ids(store, OTHERS[0])) == 8
    assert prune_items(store, TARGET, (), newest=9) == 0
