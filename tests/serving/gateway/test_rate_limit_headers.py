"""Tests that rate-limit headers follow the documentation of OpenAI and Anthropic."""

from datetime import UTC, datetime

from serving.admission.rate_limiter import Allowance, Limit
from serving.gateway.middleware import duration, rate_limit_headers

NOW = datetime(2026, 1, 1, 12, 0, 0, 500_000, tzinfo=UTC)
ALL = {
    Limit.REQUESTS_PER_MINUTE: Allowance(60, 59, 1.0),
    Limit.TOKENS_IN_PER_MINUTE: Allowance(40, 36, 6.0),
    Limit.TOKENS_OUT_PER_MINUTE: Allowance(500, 50, 54.0),
    Limit.CONCURRENT: Allowance(4, 3, 0.0),
    Limit.TOKENS_PER_DAY: Allowance(100_000, 99_000, 43_200.0),
}


def test_rate_limit_duration_is_in_openai_format() -> None:
    cases: list[tuple[float, str]] = [
        (0, "0s"),
        (0.12, "120ms"),
        (0.0001, "1ms"),
        (0.9999, "1s"),
        (1, "1s"),
        (59.2, "1m0s"),
        (360, "6m0s"),
        (3661, "1h1m1s"),
    ]
    assert [seconds for seconds, written in cases if duration(seconds) != written] == []


def test_openai_rate_limit_headers_show_requests_and_the_tightest_token_limit() -> None:
    assert rate_limit_headers(ALL, "/v1/chat/completions") == [
        (b"x-ratelimit-limit-requests", b"60"),
        (b"x-ratelimit-remaining-requests", b"59"),
        (b"x-ratelimit-reset-requests", b"1s"),
        (b"x-ratelimit-limit-tokens", b"500"),
        (b"x-ratelimit-remaining-tokens", b"50"),
        (b"x-ratelimit-reset-tokens", b"54s"),
    ]


def test_anthropic_paths_also_have_anthropic_rate_limit_headers() -> None:
    headers = dict(rate_limit_headers(ALL, "/v1/messages", NOW))
    assert headers[b"anthropic-ratelimit-requests-limit"] == b"60"
    assert headers[b"anthropic-ratelimit-requests-reset"] == b"2026-01-01T12:00:01Z"
    assert headers[b"anthropic-ratelimit-input-tokens-remaining"] == b"36"
    assert headers[b"anthropic-ratelimit-output-tokens-remaining"] == b"50"
    assert headers[b"anthropic-ratelimit-tokens-limit"] == b"500"
    assert headers[b"x-ratelimit-limit-requests"] == b"60"


def test_no_rate_limit_header_is_sent_for_an_unset_limit() -> None:
    only_at_once = {Limit.CONCURRENT: Allowance(4, 3, 0.0)}
    assert rate_limit_headers({}, "/v1/messages") == []
    assert rate_limit_headers(only_at_once, "/v1/messages", NOW) == []
    only = rate_limit_headers({Limit.REQUESTS_PER_MINUTE: Allowance(1, 0, 60)}, "/v1/models")
    only_requests = dict(only)
    assert set(only_requests) == {f"x-ratelimit-{name}-requests".encode() for name in ("limit", "remaining", "reset")}
