"""Tests `POST /v1/feedback`: it is stored with the request, counted once, and safe against hostile clients."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import select
from sqlalchemy.orm import Session

from serving.feedback.routes import MAX_CORRECTION_CHARS, MAX_LABEL_CHARS
from svc.store.tables import FeedbackRow, RequestRow
from tests.serving.service import CHAT, Service

PATH = "/v1/feedback"


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store


@pytest.fixture
async def service(socket_folder: Path, store: Store) -> AsyncIterator[Service]:
    async with Service(socket_folder, store=store).run() as service:
        yield service


@pytest.fixture
async def request_id(client: httpx.AsyncClient) -> str:
    """Return the request id of a new answer."""
    answer = await client.post("/v1/chat/completions", json=CHAT)
    return answer.headers["x-request-id"]


def kept(store: Store) -> list[FeedbackRow]:
    with Session(store) as session:
        return list(session.scalars(select(FeedbackRow)))


async def test_feedback_on_a_fresh_answer_is_stored(client: httpx.AsyncClient, request_id: str, store: Store) -> None:
    given = {"request_id": request_id, "rating": "bad", "correction": "Plug it in.", "label": "hardware"}
    answer = await client.post(PATH, json=given)
    assert answer.status_code == 200
    assert answer.json() == {
        "object": "feedback",
        "request_id": request_id,
        "rating": "bad",
        "version": "tuned@1",
        "replaced": False,
    }
    (row,) = kept(store)
    assert (row.rating, row.correction, row.label) == ("bad", "Plug it in.", "hardware")


async def test_feedback_is_stored_for_the_right_answer_if_a_client_reuses_a_request_id(
    client: httpx.AsyncClient, service: Service, store: Store
) -> None:
    asked: dict[str, Any] = {"json": CHAT, "headers": {"x-request-id": "again"}}
    first, _ = [await client.post("/v1/chat/completions", **asked) for _ in range(2)]
    await client.post(PATH, json={"request_id": first.headers["x-request-id"], "rating": "bad"})
    answer = await client.post(PATH, json={"request_id": "again", "rating": "bad"})
    assert answer.status_code == 404
    assert service.request_log.flush(5)
    with Session(store) as session:
        oldest = session.scalar(select(RequestRow.id).order_by(RequestRow.id).limit(1))
    assert [row.request for row in kept(store)] == [oldest]


async def test_repeatedly_rated_answer_is_counted_once(
    client: httpx.AsyncClient, request_id: str, service: Service
) -> None:
    for rating in ("good", "bad", "good"):
        answer = await client.post(PATH, json={"request_id": request_id, "rating": rating})
    assert answer.json()["replaced"] is True
    assert service.count("svc_feedback_total", model="tuned", version="1", rating="good") == 1
    assert service.count("svc_feedback_total", model="tuned", version="1", rating="bad") == 0


async def test_correction_text_is_redacted(client: httpx.AsyncClient, request_id: str, store: Store) -> None:
    given = {"request_id": request_id, "rating": "bad", "correction": "ask a@b.de", "label": "a@b.de"}
    await client.post(PATH, json=given)
    (row,) = kept(store)
    assert (row.correction, row.label) == ("ask [mail]", "[mail]")


async def test_feedback_on_an_unknown_request_returns_404(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json={"request_id": "req-other", "rating": "good"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "request_not_found"


async def test_request_log_is_not_flushed_for_feedback_on_an_unknown_request(
    client: httpx.AsyncClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[float] = []
    monkeypatch.setattr(service.request_log, "flush", flushed.append)
    await client.post(PATH, json={"request_id": "req-other", "rating": "good"})
    assert flushed == []


async def test_feedback_is_rejected_if_too_many_submissions_run_concurrently(
    client: httpx.AsyncClient, request_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.feedback.routes._MAX_CONCURRENT", 2)
    given = {"request_id": request_id, "rating": "good"}
    answers = await asyncio.gather(*(client.post(PATH, json=given) for _ in range(8)))
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}
    assert (await client.post(PATH, json=given)).status_code == 200


async def test_client_is_asked_to_retry_feedback_if_the_store_lags(
    client: httpx.AsyncClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.request_log, "flush", lambda timeout_s: False)
    asked = await client.post("/v1/chat/completions", json=CHAT)
    answer = await client.post(PATH, json={"request_id": asked.headers["x-request-id"], "rating": "good"})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "2"


async def test_error_names_the_invalid_feedback_field(client: httpx.AsyncClient) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"rating": "good"}, "request_id"),
        ({"request_id": "x"}, "rating"),
        ({"request_id": "x", "rating": "fine"}, "rating"),
        ({"request_id": "x", "rating": 1}, "rating"),
        ({"request_id": "", "rating": "good"}, "request_id"),
        ({"request_id": "x" * 129, "rating": "good"}, "request_id"),
        ({"request_id": "x", "rating": "good", "stars": 5}, "stars"),
        ({"request_id": "x", "rating": "good", "correction": "x" * (MAX_CORRECTION_CHARS + 1)}, "correction"),
        ({"request_id": "x", "rating": "good", "label": "x" * (MAX_LABEL_CHARS + 1)}, "label"),
    ]
    for body, param in cases:
        answer = await client.post(PATH, json=body)
        assert answer.status_code == 400, body
        assert answer.json()["error"]["param"] == param, body


async def test_invalid_feedback_body_returns_400(client: httpx.AsyncClient) -> None:
    for body in (b"", b"{", b"[]", b"null", b"\xff", b'{"request_id": "\\ud800", "rating": "good"}'):
        answer = await client.post(PATH, content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 404), body
        assert answer.json()["error"]["type"] == "invalid_request_error", body


async def test_feedback_body_over_the_limit_is_rejected(client: httpx.AsyncClient) -> None:
    body = json.dumps({"request_id": "x", "rating": "good", "correction": "x" * 300_000})
    answer = await client.post(PATH, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 413


async def test_feedback_with_a_media_type_exempt_from_cors_preflight_is_rejected(client: httpx.AsyncClient) -> None:
    """A form or a simple fetch from another site can send any media type except JSON."""
    answer = await client.post(PATH, content=b"{}", headers={"content-type": "text/plain"})
    assert answer.status_code == 415
