"""Tests that only requests whose stored texts are complete are found for a replay, newest first."""

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine as Store

from svc.dataset.schema.tool_calls import ToolCall, answer_text
from svc.redaction import PLACEHOLDERS
from svc.store.kept_requests import find_kept_requests, read_kept_request
from svc.store.requests import RequestOutcome, add_requests, prune_requests
from svc.version import Format, VersionId
from tests.builders.requests import CHAT, NOON, RECORD, TARGET

KEPT = RECORD._replace(prompt='[{"role": "user", "content": "hi"}]', answer="hello")
CALL = ToolCall("rain", "{}")
DAY = timedelta(days=1)


def found(store: Store, *, before_row: int | None = None, limit: int = 100) -> list[int]:
    return find_kept_requests(
        store,
        TARGET,
        route=CHAT,
        since=NOON - DAY,
        before=NOON + DAY,
        without=PLACEHOLDERS,
        before_row=before_row,
        limit=limit,
    )


def test_replayable_requests_are_found_newest_first(store: Store) -> None:
    records = [KEPT._replace(answer="old"), KEPT._replace(answer="new")]
    add_requests(store, records)
    assert [read_kept_request(store, row) for row in found(store)] == records[::-1]


def test_search_for_replayable_requests_respects_its_limit_and_starting_row(store: Store) -> None:
    add_requests(store, [KEPT] * 4)
    rows = found(store)
    assert found(store, limit=3) == rows[:3]
    assert found(store, before_row=rows[0], limit=2) == rows[1:3]


INCOMPLETE: list[dict[str, Any]] = [
    {"outcome": RequestOutcome.CLIENT_GONE},
    {"outcome": RequestOutcome.REFUSED},
    {"outcome": RequestOutcome.ENGINE_ERROR},
    {"outcome": RequestOutcome.SERVER_ERROR},
    {"finish_reason": "tool_calls"},
    {"prompt": None, "answer": None},
    {"answer": answer_text("", [CALL]), "finish_reason": "stop"},
    {"answer": answer_text("I look.", [CALL, CALL]), "finish_reason": "length"},
    {"route": "/v1/completions"},
    {"version": VersionId("tiny", 3)},
    {"format": Format.MERGED},
    {"started_at": NOON - 2 * DAY},
    {"started_at": NOON + 2 * DAY},
    {"answer": "call [phone]"},
    {"prompt": '[{"role": "user", "content": "I am [mail]"}]'},
    {"prompt": '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]'},
    {"prompt": '[{"role": "tool", "content": "rain"}]'},
    {"prompt": '[{"role": "assistant", "tool_calls": [{"id": "1"}]}]'},
]


def test_requests_that_cannot_be_replayed_exactly_are_excluded(store: Store) -> None:
    wrong, count = [], 0
    for fields in INCOMPLETE:
        add_requests(store, [KEPT._replace(**fields)])
        if len(found(store)) > count:
            wrong.append(fields)
            count += 1
    assert wrong == []


@pytest.mark.parametrize(
    "fields",
    [
        {"finish_reason": None},
        {"answer": ""},
        {"answer": '{"type": "image", "role": "tool"}'},
        {"prompt": r'[{"role": "user", "content": "{\"type\": \"image\", \"role\": \"tool\"}"}]'},
        {"prompt": '[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]'},
    ],
)
def test_requests_that_contain_only_text_can_be_replayed(store: Store, fields: dict[str, Any]) -> None:
    add_requests(store, [KEPT._replace(**fields)])
    assert len(found(store)) == 1


def test_reading_a_deleted_request_returns_none(store: Store) -> None:
    add_requests(store, [KEPT])
    (row,) = found(store)
    prune_requests(store, before=NOON + DAY, max_bytes=2**40)
    assert read_kept_request(store, row) is None
