"""Tests that only greedy answers with complete texts are scored, newest first."""

from collections.abc import Collection
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import event, select
from sqlalchemy.orm import Session

from svc.dataset.schema.tool_calls import ToolCall, answer_text
from svc.redaction import PLACEHOLDERS
from svc.store.kept_requests import MOST_TOKENS, KeptAnswer, keep_logprob, newest_unscored
from svc.store.requests import RequestRecord, add_requests, prune_requests
from svc.store.tables import RequestRow
from svc.version import Format, Target, VersionId
from tests.builders.requests import CHAT, NOON, RECORD, TARGET

CALL = ToolCall("rain", "{}")
KEPT = RECORD._replace(temperature=0.0, prompt='[{"role": "user", "content": "hi"}]', answer="hello")


def newest(store: Store, passed: Collection[int] = (), target: Target = TARGET) -> KeptAnswer | None:
    since = NOON - timedelta(hours=1)
    return newest_unscored(store, target, route=CHAT, since=since, without=PLACEHOLDERS, passed=passed)


def at(minutes: int, **fields: Any) -> RequestRecord:
    return KEPT._replace(started_at=NOON + timedelta(minutes=minutes), **fields)


def test_newest_unscored_answer_is_returned_first(store: Store) -> None:
    add_requests(store, [at(1, answer="old"), at(3, answer="new"), at(2, answer="older")])
    answers = []
    while (row := newest(store)) is not None:
        answers.append(row.answer)
        keep_logprob(store, row.id, -0.5)
    assert answers == ["new", "older", "old"]
    with Session(store) as session:
        assert session.scalars(select(RequestRow.logprob)).all() == [-0.5] * 3


def test_answers_with_a_previous_scoring_attempt_are_skipped(store: Store) -> None:
    add_requests(store, [at(1, answer="old"), at(2, answer="new")])
    first = newest(store)
    assert first is not None
    second = newest(store, passed=[first.id])
    assert second is not None
    assert (first.answer, second.answer) == ("new", "old")
    assert newest(store, passed=[first.id, second.id]) is None


NOT_COMPARABLE: list[dict[str, Any]] = [
    {"temperature": 0.1},
    {"temperature": None},
    {"status": 499},
    {"finish_reason": "tool_calls"},
    {"finish_reason": None},
    {"prompt": None, "answer": None},
    {"answer": ""},
    {"answer": " \n\t "},
    {"answer": answer_text("", [CALL]), "finish_reason": "stop"},
    {"answer": answer_text("I look.", [CALL, CALL]), "finish_reason": "length"},
    {"route": "/v1/completions"},
    {"version": VersionId("tiny", 3)},
    {"model": "other", "version": VersionId("other", 2)},
    {"format": Format.MERGED},
    {"started_at": NOON - timedelta(minutes=61)},
    *({"answer": f"call {placeholder} now"} for placeholder in PLACEHOLDERS),
    {"prompt": '[{"role": "user", "content": "I am [mail]"}]'},
    {"tokens_in": MOST_TOKENS, "tokens_out": 1},
    {"tokens_in": 1, "tokens_out": MOST_TOKENS},
    {"tokens_in": None},
    {"tokens_out": None},
]


@pytest.mark.slow
def test_answers_that_violate_any_condition_for_scoring_are_not_selected(store: Store) -> None:
    scored = []
    for fields in NOT_COMPARABLE:
        add_requests(store, [KEPT._replace(**fields)])
        if (row := newest(store)) is not None:
            keep_logprob(store, row.id, -0.5)
            scored.append(fields)
    assert scored == []


@pytest.mark.parametrize(
    "fields",
    [
        {"finish_reason": "length"},
        {"answer": "[other] %_ mail"},
        {"answer": "\n{}\n"},
        {"answer": '{"name": "Alice", "age": 3}'},
        {"tokens_in": MOST_TOKENS - 1, "tokens_out": 1},
    ],
)
def test_answers_that_meet_all_conditions_for_scoring_are_selected(store: Store, fields: dict[str, Any]) -> None:
    add_requests(store, [KEPT._replace(**fields)])
    assert newest(store) is not None


def test_no_score_is_stored_for_a_request_deleted_during_scoring(store: Store) -> None:
    add_requests(store, [KEPT])
    row = newest(store)
    assert row is not None
    prune_requests(store, before=NOON + timedelta(days=1), max_bytes=2**40)
    keep_logprob(store, row.id, -0.5)
    assert newest(store) is None


def test_only_answers_from_the_last_hour_are_scored(sqlite_store: Store) -> None:
    """A store without a row that can be scored may contain a month of other rows."""
    store = sqlite_store
    statements: list[Any] = []

    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if statement.startswith("SELECT"):
            statements.append((statement, parameters))

    event.listen(store, "before_cursor_execute", explain)
    newest(store)
    event.remove(store, "before_cursor_execute", explain)
    ((statement, parameters),) = statements
    with store.connect() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
    searches = [step.detail for step in plan if "requests" in step.detail]
    assert searches == ["SEARCH requests USING INDEX ix_requests_started_at (started_at>?)"]
    assert not [step.detail for step in plan if "ORDER BY" in step.detail]
