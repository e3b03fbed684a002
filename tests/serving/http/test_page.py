"""Tests of pages of rows, in both databases."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine as Store

from serving.files.rows import ClientFile, Purpose, add_file, find_file, read_files
from serving.http.page import EntryNotFoundError, Page

MOMENT = datetime(2026, 11, 30, 12, tzinfo=UTC)


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store


def add(store: Store, id: str, *, second: int = 0, owner: str = "key-1") -> None:
    created = MOMENT + timedelta(seconds=second)
    add_file(store, ClientFile(id, owner, Purpose.FINE_TUNE, "a.jsonl", 1, "00", created))


def ids(store: Store, page: Page, owner: str | None = "key-1") -> tuple[list[str], bool]:
    files, more = read_files(store, owner, page=page)
    return [file.id for file in files], more


@pytest.mark.parametrize("newest_first", [True, False])
def test_successive_pages_list_every_row_once_even_if_rows_have_equal_timestamps(
    store: Store, newest_first: bool
) -> None:
    for id, second in (("a", 0), ("b", 1), ("c", 1), ("d", 1), ("e", 2)):
        add(store, id, second=second)
    listed: list[str] = []
    more = True
    while more:
        page, more = ids(store, Page(2, listed[-1] if listed else None, newest_first=newest_first))
        listed += page
    assert listed == (list("edcba") if newest_first else list("abcde"))


def test_page_contains_only_rows_of_the_requested_owner(store: Store) -> None:
    add(store, "a")
    add(store, "b", owner="key-2")
    assert ids(store, Page(10)) == (["a"], False)
    assert ids(store, Page(10), owner=None) == (["b", "a"], False)


def test_page_cursor_that_refers_to_a_row_of_a_different_owner_is_rejected(store: Store) -> None:
    add(store, "a", owner="key-2")
    with pytest.raises(EntryNotFoundError, match="no entry 'a'"):
        ids(store, Page(10, "a"))


@pytest.mark.parametrize("id", ["", "a\0", "../a", "x" * 10_000, "file-\u00e9"])
def test_malformed_id_raises_a_not_found_error(store: Store, id: str) -> None:
    with pytest.raises(EntryNotFoundError):
        find_file(store, id, None)
    with pytest.raises(EntryNotFoundError):
        ids(store, Page(10, id))


def test_row_of_a_different_owner_is_not_found(store: Store) -> None:
    add(store, "a", owner="key-2")
    with pytest.raises(EntryNotFoundError, match="no file 'a'"):
        find_file(store, "a", "key-1")
    assert find_file(store, "a", None).owner == "key-2"
