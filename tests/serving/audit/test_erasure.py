"""Tests that selected requests, and nothing else, are deleted completely."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import ColumnElement, func, select
from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from serving.audit.erasure import Forgotten, before, count_requests, forget_requests, of_key, of_user
from svc.store import requests
from svc.store.feedback import Feedback, Rating, keep_feedback
from svc.store.requests import add_requests, hash_user
from svc.store.tables import FeedbackRow
from tests.builders.requests import NOON, RECORD, kept

MARK = "my mother's maiden name"
MINE = RECORD._replace(request_id="mine", key_id="abcd0123", user_hash=hash_user("a@b.de"), prompt=MARK, answer="so?")
OTHERS = RECORD._replace(
    request_id="other", key_id="other000", user_hash=hash_user("c@d.de"), started_at=NOON + timedelta(days=1)
)
NOBODYS = OTHERS._replace(request_id="nobody", key_id=None, user_hash=None)


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store


@pytest.fixture(params=[of_user("a@b.de"), of_key("abcd0123"), before(NOON + timedelta(hours=1))])
def which(request: pytest.FixtureRequest) -> ColumnElement[bool]:
    """Return a condition that selects only the first request."""
    found: ColumnElement[bool] = request.param
    return found


@pytest.fixture
def three(store: Store) -> Store:
    """Return a store with one request to delete, which has feedback, and two to keep."""
    return filled(store)


def filled(store: Store) -> Store:
    """Add one request to delete, which has feedback, and two to keep."""
    add_requests(store, [MINE, OTHERS, NOBODYS])
    for request_id in ("mine", "other"):
        keep_feedback(store, request_id, Feedback(Rating.BAD, correction=MARK if request_id == "mine" else None))
    return store


def test_only_selected_requests_and_their_feedback_are_deleted(three: Store, which: ColumnElement[bool]) -> None:
    assert forget_requests(three, which) == Forgotten(requests=1, contents=1, feedback=1)
    assert kept(three) == ["other", "nobody"]
    with Session(three) as session:
        assert session.scalar(select(func.count()).select_from(FeedbackRow)) == 1


def test_counting_requests_to_erase_deletes_nothing(three: Store, which: ColumnElement[bool]) -> None:
    assert count_requests(three, which) == Forgotten(1, 1, 1)
    assert len(kept(three)) == 3


def test_nothing_is_deleted_when_no_request_is_selected(three: Store) -> None:
    assert forget_requests(three, of_key("nobody00")) == Forgotten(0, 0, 0)
    assert len(kept(three)) == 3


def test_many_requests_are_deleted_in_several_transactions(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_DELETED_TOGETHER", 3)
    add_requests(store, [MINE._replace(request_id=str(number)) for number in range(10)])
    assert forget_requests(store, of_key("abcd0123")).requests == 10
    assert kept(store) == []


def in_files(home: Path, text: str) -> bool:
    """Return whether a text can be read in the database files."""
    return any(text.encode() in path.read_bytes() for path in home.glob("svc.db*"))


def test_deleted_request_text_does_not_remain_in_any_sqlite_file(sqlite_store: Store, tmp_path: Path) -> None:
    filled(sqlite_store)
    assert in_files(tmp_path / "home", MARK)
    forget_requests(sqlite_store, of_key("abcd0123"))
    assert not in_files(tmp_path / "home", MARK)


def test_stored_requests_do_not_contain_the_user_name(sqlite_store: Store, tmp_path: Path) -> None:
    filled(sqlite_store)
    assert not in_files(tmp_path / "home", "a@b.de")


@pytest.mark.parametrize("change", [str.upper, lambda user: user + " ", lambda user: user[:-1]])
def test_different_users_have_different_user_hashes(change: Callable[[str], str]) -> None:
    assert hash_user(change("a@b.de")) != hash_user("a@b.de")


def test_any_user_name_can_be_hashed() -> None:
    assert len({hash_user(user) for user in ("", "\ud800", "x" * 10_000, "é")}) == 4


def test_request_record_size_includes_the_user_hash() -> None:
    assert MINE.bytes - MINE._replace(user_hash=None).bytes == 32
