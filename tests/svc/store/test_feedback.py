"""Tests that a request has at most one feedback, and that the last feedback counts."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import select
from sqlalchemy.orm import Session

from svc.store.feedback import Feedback, KeptFeedback, Rating, keep_feedback
from svc.store.requests import add_requests
from svc.store.tables import FeedbackRow
from svc.version import VersionId
from tests.builders.requests import RECORD


def test_feedback_stores_the_rated_version(store: Store) -> None:
    add_requests(store, [RECORD])
    assert keep_feedback(store, "req-1", Feedback(Rating.GOOD)) == KeptFeedback(VersionId("tiny", 2), None)


def test_request_that_no_version_answered_can_be_rated(store: Store) -> None:
    add_requests(store, [RECORD._replace(version=None)])
    assert keep_feedback(store, "req-1", Feedback(Rating.BAD)) == KeptFeedback(None, None)


def test_feedback_on_a_nonexistent_request_is_not_stored(store: Store) -> None:
    assert keep_feedback(store, "req-1", Feedback(Rating.GOOD)) is None


def test_new_feedback_on_a_request_replaces_the_earlier_feedback_entirely(store: Store) -> None:
    add_requests(store, [RECORD])
    keep_feedback(store, "req-1", Feedback(Rating.GOOD, "hardware", "a correction"))
    kept = keep_feedback(store, "req-1", Feedback(Rating.BAD))
    assert kept is not None
    assert kept.replaced is Rating.GOOD
    with Session(store) as session:
        row = session.scalars(select(FeedbackRow)).one()
        assert (row.rating, row.label, row.correction) == ("bad", None, None)


@pytest.mark.slow
def test_concurrent_feedback_on_the_same_request_is_accepted(store: Store) -> None:
    """A double click sends the same feedback twice."""
    add_requests(store, [RECORD])
    with ThreadPoolExecutor(8) as threads:
        kept = list(threads.map(lambda _: keep_feedback(store, "req-1", Feedback(Rating.GOOD)), range(32)))
    assert sum(found is not None and found.replaced is None for found in kept) == 1


def test_feedback_applies_to_the_newest_request_if_several_have_the_same_id(store: Store) -> None:
    add_requests(store, [RECORD, RECORD._replace(version=VersionId("tiny", 3))])
    kept = keep_feedback(store, "req-1", Feedback(Rating.GOOD))
    assert kept is not None
    assert kept.version == VersionId("tiny", 3)


def test_api_key_can_rate_only_its_own_answers(store: Store) -> None:
    add_requests(store, [RECORD._replace(key_id="mine")])
    assert keep_feedback(store, "req-1", Feedback(Rating.GOOD), key_id="other") is None
    assert keep_feedback(store, "req-1", Feedback(Rating.GOOD), key_id="mine") is not None


def test_unauthenticated_request_cannot_be_rated_with_an_api_key(store: Store) -> None:
    add_requests(store, [RECORD])
    assert keep_feedback(store, "req-1", Feedback(Rating.GOOD), key_id="mine") is None


def test_feedback_applies_to_the_request_made_with_the_same_api_key_if_request_ids_are_equal(store: Store) -> None:
    add_requests(store, [RECORD._replace(key_id="mine"), RECORD._replace(key_id="other", version=VersionId("tiny", 3))])
    kept = keep_feedback(store, "req-1", Feedback(Rating.GOOD), key_id="mine")
    assert kept is not None
    assert kept.version == RECORD.version
