"""One word for each request, the last one counts."""

from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import Engine as Store
from sqlalchemy import select
from sqlalchemy.orm import Session

from svc.store.feedback import Feedback, KeptFeedback, Rating, keep_feedback
from svc.store.requests import add_requests
from svc.store.tables import FeedbackRow
from svc.version import VersionId
from tests.svc.store.test_requests import RECORD


def test_it_says_which_version_was_rated(store: Store) -> None:
    add_requests(store, [RECORD])
    assert keep_feedback(store, "req-1", Feedback(Rating.GOOD)) == KeptFeedback(VersionId("tiny", 2), None)


def test_a_request_that_no_version_answered_can_be_rated(store: Store) -> None:
    add_requests(store, [RECORD._replace(version=None)])
    assert keep_feedback(store, "req-1", Feedback(Rating.BAD)) == KeptFeedback(None, None)


def test_nothing_is_kept_for_a_request_that_is_not(store: Store) -> None:
    assert keep_feedback(store, "req-1", Feedback(Rating.GOOD)) is None


def test_a_second_word_replaces_the_first_as_a_whole(store: Store) -> None:
    add_requests(store, [RECORD])
    keep_feedback(store, "req-1", Feedback(Rating.GOOD, "hardware", "a correction"))
    kept = keep_feedback(store, "req-1", Feedback(Rating.BAD))
    assert kept is not None
    assert kept.replaced is Rating.GOOD
    with Session(store) as session:
        row = session.scalars(select(FeedbackRow)).one()
        assert (row.rating, row.label, row.correction) == ("bad", None, None)


def test_two_words_at_once_are_both_taken(store: Store) -> None:
    """A double click."""
    add_requests(store, [RECORD])
    with ThreadPoolExecutor(8) as threads:
        kept = list(threads.map(lambda _: keep_feedback(store, "req-1", Feedback(Rating.GOOD)), range(32)))
    assert sum(found is not None and found.replaced is None for found in kept) == 1


def test_of_two_requests_with_one_id_the_newer_is_meant(store: Store) -> None:
    add_requests(store, [RECORD, RECORD._replace(version=VersionId("tiny", 3))])
    kept = keep_feedback(store, "req-1", Feedback(Rating.GOOD))
    assert kept is not None
    assert kept.version == VersionId("tiny", 3)


def test_a_key_rates_its_own_answers_alone(store: Store) -> None:
    add_requests(store, [RECORD._replace(key_id="mine")])
    assert keep_feedback(store, "req-1", Feedback(Rating.GOOD), key_id="other") is None
    assert keep_feedback(store, "req-1", Feedback(Rating.GOOD), key_id="mine") is not None


def test_a_request_of_no_key_is_no_keys_own(store: Store) -> None:
    add_requests(store, [RECORD])
    assert keep_feedback(store, "req-1", Feedback(Rating.GOOD), key_id="mine") is None


def test_another_keys_request_of_the_same_id_hides_nothing(store: Store) -> None:
    add_requests(store, [RECORD._replace(key_id="mine"), RECORD._replace(key_id="other", version=VersionId("tiny", 3))])
    kept = keep_feedback(store, "req-1", Feedback(Rating.GOOD), key_id="mine")
    assert kept is not None
    assert kept.version == RECORD.version
