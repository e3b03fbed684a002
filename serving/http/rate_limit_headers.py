"""What is left of a key's limits, in the headers that clients of OpenAI's and of Anthropic's API read.

OpenAI has one header for tokens: it shows the limit on tokens of which the smallest share is left. Anthropic has one
for those in and one for those out as well, and says when a limit is whole again where OpenAI says how long that takes.
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from serving.admission.rate_limiter import Allowance, Limit
from serving.http.header_lines import HeaderLines
from serving.protocols.route import ANTHROPIC_PATHS

_REQUESTS = Limit.REQUESTS_PER_MINUTE
_TOKENS = (Limit.TOKENS_IN_PER_MINUTE, Limit.TOKENS_OUT_PER_MINUTE, Limit.TOKENS_PER_DAY)


def rate_limit_headers(allowances: Mapping[Limit, Allowance], path: str, now: datetime | None = None) -> HeaderLines:
    """The headers of an answer; for limits that there are.

    Args:
        path: of the request.
        now: the time.
    """
    if not allowances:
        return b""
    requests, tokens = allowances.get(_REQUESTS), _tightest(allowances)
    lines = _openai(b"requests", requests) if requests else b""
    if tokens:
        lines += _openai(b"tokens", tokens)
    if path in ANTHROPIC_PATHS:
        now = now or datetime.now(UTC)
        shown = {
            b"requests": requests,
            b"tokens": tokens,
            b"input-tokens": allowances.get(Limit.TOKENS_IN_PER_MINUTE),
            b"output-tokens": allowances.get(Limit.TOKENS_OUT_PER_MINUTE),
        }
        lines += b"".join(_anthropic(name, allowance, now) for name, allowance in shown.items() if allowance)
    return lines


def duration(seconds: float) -> str:
    """As OpenAI writes it: `120ms`, `1s`, `6m0s`, `1h0m0s`; rounded up."""
    if seconds < 1:
        milliseconds = math.ceil(seconds * 1000)
        return f"{milliseconds}ms" if 0 < milliseconds < 1000 else f"{milliseconds // 1000}s"
    minutes, left = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{left}s"
    return f"{minutes}m{left}s" if minutes else f"{left}s"


def _tightest(allowances: Mapping[Limit, Allowance]) -> Allowance | None:
    tightest, least = None, math.inf
    for limit in _TOKENS:
        allowance = allowances.get(limit)
        if allowance and (left := allowance.remaining / (allowance.limit or 1)) < least:
            tightest, least = allowance, left
    return tightest


def _openai(name: bytes, allowance: Allowance) -> HeaderLines:
    return b"x-ratelimit-limit-%b: %d\r\nx-ratelimit-remaining-%b: %d\r\nx-ratelimit-reset-%b: %b\r\n" % (
        name,
        allowance.limit,
        name,
        allowance.remaining,
        name,
        duration(allowance.reset_s).encode(),
    )


def _anthropic(name: bytes, allowance: Allowance, now: datetime) -> HeaderLines:
    whole = (now + timedelta(seconds=math.ceil(allowance.reset_s))).strftime("%Y-%m-%dT%H:%M:%SZ").encode()
    prefix = b"anthropic-ratelimit-%b" % name
    return b"%b-limit: %d\r\n%b-remaining: %d\r\n%b-reset: %b\r\n" % (
        prefix,
        allowance.limit,
        prefix,
        allowance.remaining,
        prefix,
        whole,
    )
