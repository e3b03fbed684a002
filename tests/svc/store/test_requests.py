"""Tests that request rows are complete, and are deleted by age and size together with their feedback."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from svc.store import requests
from svc.store.feedback import Feedback, Rating, keep_feedback
from svc.store.requests import Pruned, RequestOutcome, RequestRecord, add_requests, prune_requests
from svc.store.tables import FeedbackRow, RequestRow
from svc.version import Format
from tests.builders.requests import LONG_AGO, NOON, PLENTY, RECORD, fill, kept
from tests.builders.statements import statements


def test_stored_request_row_has_the_values_of_the_request_record(store: Store) -> None:
    add_requests(store, [RECORD])
    with Session(store) as session:
        row = session.scalars(select(RequestRow)).one()
        assert (row.request_id, row.started_at, row.model, row.number, row.format) == ("req-1", NOON, "tiny", 2, "gptq")
        assert (row.seconds, row.first_token_seconds, row.tokens_in, row.tokens_out) == (1.5, 0.25, 10, 5)
        assert (row.status, row.reason, row.finish_reason, row.key_id) == (200, None, "stop", None)
        assert (row.prompt, row.answer) == (None, None)
        assert (row.temperature, row.max_tokens, row.logprob) == (0.7, 64, None)
        assert row.client_request_id == "mine"


def test_each_request_value_is_stored_in_its_own_column(store: Store) -> None:
    numbers = iter(range(1, 99))
    made: dict[str, object] = {name: name for name, kind in RequestRecord.__annotations__.items() if "str" in str(kind)}
    made |= {name: next(numbers) for name in ("status", "seconds", "first_token_seconds", "tokens_in", "tokens_out")}
    made |= {name: next(numbers) for name in ("temperature", "max_tokens")}
    record = RECORD._replace(**made, outcome=RequestOutcome.CLIENT_SLOW)  # type: ignore[arg-type]
    add_requests(store, [record])
    with Session(store) as session:
        row = session.scalars(select(RequestRow)).one()
    kept = {name: getattr(row, name) for name in RequestRecord._fields if name not in ("version", "format")}
    assert kept == {name: getattr(record, name) for name in kept}
    assert (row.number, row.format, row.bytes) == (2, Format.GPTQ, record.bytes)


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
def test_request_is_stored_even_if_its_text_contains_unsupported_characters(store: Store, text: str) -> None:
    fields = dict.fromkeys(("prompt", "answer", "client_request_id", "finish_reason"), text)
    add_requests(store, [RECORD, RECORD._replace(request_id="hostile", **fields)])  # type: ignore[arg-type]
    with Session(store) as session:
        row = session.scalars(select(RequestRow).where(RequestRow.request_id == "hostile")).one()
    assert {getattr(row, name) for name in fields} == {"a?b"}


def test_numbers_that_exceed_32_bits_are_stored(store: Store) -> None:
    add_requests(store, [RECORD._replace(max_tokens=2**62, tokens_in=2**40)])
    with Session(store) as session:
        row = session.scalars(select(RequestRow)).one()
    assert (row.max_tokens, row.tokens_in) == (2**62, 2**40)


def test_request_that_no_version_answered_is_stored(store: Store) -> None:
    add_requests(store, [RECORD._replace(model="unknown", version=None, format=None, status=404, reason="x")])
    with Session(store) as session:
        row = session.scalars(select(RequestRow)).one()
        assert (row.model, row.number, row.format) == ("unknown", None, None)


def test_requests_older_than_the_retention_limit_are_deleted(store: Store) -> None:
    fill(store, 10)
    assert prune_requests(store, before=NOON - timedelta(minutes=3), max_bytes=PLENTY).rows == 6
    assert kept(store) == ["req-6", "req-7", "req-8", "req-9"]


def test_request_with_a_wrong_timestamp_does_not_cause_deletion_of_other_requests(store: Store) -> None:
    fill(store, 3)
    add_requests(store, [RECORD._replace(request_id="at boot", started_at=datetime(1970, 1, 1, tzinfo=UTC))])
    prune_requests(store, before=LONG_AGO, max_bytes=PLENTY)
    assert kept(store) == ["req-0", "req-1", "req-2"]


def test_oldest_requests_are_deleted_when_the_request_table_exceeds_its_size_limit(store: Store) -> None:
    fill(store, 10)
    size = RECORD.bytes
    prune_requests(store, before=LONG_AGO, max_bytes=5 * size)
    assert kept(store) == ["req-6", "req-7", "req-8", "req-9"]  # nine tenths of five


def test_no_stored_requests_are_deleted_while_their_age_and_size_are_within_the_limits(store: Store) -> None:
    fill(store, 3)
    assert prune_requests(store, before=LONG_AGO, max_bytes=3 * RECORD.bytes).rows == 0
    assert len(kept(store)) == 3


def test_deleting_old_requests_returns_the_remaining_size(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_DELETED_TOGETHER", 2)
    fill(store, 10)
    size = RECORD.bytes
    before = NOON - timedelta(minutes=7)
    assert prune_requests(store, before=before, max_bytes=5 * size) == Pruned(6, 4 * size)
    assert prune_requests(store, before=LONG_AGO, max_bytes=5 * size, known_bytes=4 * size) == Pruned(0, 4 * size)
    assert prune_requests(store, before=NOON, max_bytes=5 * size, known_bytes=4 * size) == Pruned(3, size)
    assert kept(store) == ["req-9"]


def test_pruning_skips_the_exact_size_query_when_the_known_size_is_within_the_limit(store: Store) -> None:
    fill(store, 3)
    with statements(store) as sent:
        prune_requests(store, before=LONG_AGO, max_bytes=3 * RECORD.bytes, known_bytes=3 * RECORD.bytes)
    assert not [statement for statement in sent if "sum(" in statement]
    lock, delete = sent
    assert lock == "BEGIN IMMEDIATE" or "pg_advisory_xact_lock" in lock
    assert delete.startswith("DELETE")


def test_no_request_is_deleted_if_only_the_estimated_table_size_exceeds_the_limit(store: Store) -> None:
    fill(store, 3)
    size = 3 * RECORD.bytes
    assert prune_requests(store, before=LONG_AGO, max_bytes=size, known_bytes=size + 1) == Pruned(0, size)


def test_size_limit_includes_prompts_and_answers(store: Store) -> None:
    fill(store, 4, prompt="é" * 5000, answer="b" * 5000)
    prune_requests(store, before=LONG_AGO, max_bytes=40_000)
    assert kept(store) == ["req-2", "req-3"]


def test_size_of_a_stored_request_includes_its_latest_feedback_correction(store: Store) -> None:
    fill(store, 2)
    keep_feedback(store, "req-1", Feedback(Rating.BAD, correction="c" * 10_000))
    keep_feedback(store, "req-1", Feedback(Rating.BAD, correction="c" * 20_000))
    with Session(store) as session:
        assert session.scalar(select(func.sum(RequestRow.bytes))) == 2 * RECORD.bytes + 20_000


def test_large_deletions_of_requests_are_split_into_several_transactions(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "_DELETED_TOGETHER", 3)
    fill(store, 10)
    assert prune_requests(store, before=NOON, max_bytes=PLENTY).rows == 9
    assert kept(store) == ["req-9"]


def test_feedback_is_deleted_with_its_request(store: Store) -> None:
    fill(store, 2)
    for request_id in ("req-0", "req-1"):
        keep_feedback(store, request_id, Feedback(Rating.GOOD))
    prune_requests(store, before=NOON, max_bytes=PLENTY)
    with Session(store) as session:
        assert session.scalar(select(func.count()).select_from(FeedbackRow)) == 1


@pytest.mark.slow
def test_estimated_row_size_is_close_to_the_actual_row_size(sqlite_store: Store) -> None:
    """Retention by size is only as precise as this estimate."""
    store = sqlite_store
    with store.connect() as connection:
        before = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        size = connection.exec_driver_sql("PRAGMA page_size").scalar_one()
    records = [RECORD._replace(request_id=f"req-{index:032x}") for index in range(5000)]
    add_requests(store, records)
    with store.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one() - before
    assert pages * size / 5000 == pytest.approx(records[0].bytes, rel=0.3)
