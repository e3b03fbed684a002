"""Tests errors as clients see them: in a uniform format and without internal details."""

import json
import logging

import pytest
from starlette.exceptions import HTTPException

from serving.admission.errors import EngineUnavailableError, OverloadedError, QueueOverflowError, QueueTimeoutError
from serving.engines.transport import EngineFailedError
from serving.http.errors import ApiError, api_error, change_error
from serving.protocols.error_code import ErrorCode
from svc.errors import IntegrityError, RegistryError, SvcError
from svc.store.unavailable import StoreUnavailableError


def test_error_includes_retry_after_if_a_retry_may_help() -> None:
    cases: list[tuple[SvcError, int, str, str]] = [
        (OverloadedError("x"), 429, "overloaded", "rate_limit_error"),
        (QueueOverflowError("x"), 503, "queue_overflow", "server_error"),
        (QueueTimeoutError("x"), 503, "queue_timeout", "server_error"),
        (EngineUnavailableError("x"), 503, "engine_unavailable", "server_error"),
    ]
    for error, status, code, kind in cases:
        shown = api_error(error)
        assert (shown.status, shown.code, shown.type) == (status, code, kind), error
        assert 0 < int(shown.headers["retry-after"]) < 120, error


def test_database_outage_error_names_the_database_to_admins_but_not_to_clients() -> None:
    error = StoreUnavailableError(RegistryError("the store at db:5432/x is not responding", todo="check it"))
    shown, hidden = change_error(error), api_error(error)
    assert (shown.status, shown.code, shown.parts["todo"]) == (503, ErrorCode.STORE_UNAVAILABLE, "check it")
    assert (hidden.status, hidden.code) == (503, ErrorCode.STORE_UNAVAILABLE)
    assert "db:5432" in shown.message
    assert "db:5432" not in hidden.message


@pytest.mark.parametrize(
    "error", [IntegrityError("/root/models/tuned/1 is broken"), ValueError("/etc/passwd"), SvcError("/x")]
)
def test_unexpected_error_is_logged_and_hidden_from_the_client(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    shown = api_error(error)
    assert (shown.status, shown.code) == (500, ErrorCode.INTERNAL_ERROR)
    assert "/" not in shown.message
    assert caplog.records[0].exc_info is not None


def test_engine_error_is_logged_and_hidden_from_the_client(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        shown = api_error(EngineFailedError("the engine answered 500: no room in /root/cache"))
    assert "/root" not in shown.message
    assert "/root/cache" in caplog.text


def test_framework_errors_use_the_api_error_format() -> None:
    for status in (400, 401, 404, 405, 418, 500):
        error = json.loads(api_error(HTTPException(status, "/secret")).body())["error"]
        assert set(error) == {"message", "type", "param", "code"}, status
        assert "secret" not in error["message"], status


def test_error_body_is_valid_json_for_any_message() -> None:
    body = ApiError(400, ErrorCode.INVALID_REQUEST, 'a "b"\n\x00\ud800', "p").body()
    assert b"\n" not in body
    assert json.loads(body)["error"]["message"] == 'a "b"\n\x00\ud800'
