"""What is left of a key's limits, in the headers that clients of OpenAI's and of Anthropic's API read.

OpenAI has one header for tokens: it shows the limit on tokens of which the smallest share is left. Anthropic has one
for those in and one for those out as well, and says when a limit is whole again where OpenAI says how long that takes.
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from serving.admission.rate_limiter import Allowance, Limit
from serving.protocols.route import ANTHROPIC_PATHS

Headers = list[tuple[bytes, bytes]]

_OPENAI = {
    of: tuple(f"x-ratelimit-{what}-{of}".encode() for what in ("limit", "remaining", "reset"))
    for of in ("requests", "tokens")
}
_TOKENS = (Limit.TOKENS_IN_PER_MINUTE, Limit.TOKENS_OUT_PER_MINUTE, Limit.TOKENS_PER_DAY)


def rate_limit_headers(allowances: Mapping[Limit, Allowance], path: str, now: datetime | None = None) -> Headers:
    """The headers of an answer; for limits that there are.

    Args:
        path: of the request.
        now: the time.
    """
    if not allowances:
        return []
    requests, tokens = allowances.get(Limit.REQUESTS_PER_MINUTE), _tightest(allowances)
    headers = [*_openai("requests", requests), *_openai("tokens", tokens)]
    if path in ANTHROPIC_PATHS:
        now = now or datetime.now(UTC)
        shown = {
            "requests": requests,
            "tokens": tokens,
            "input-tokens": allowances.get(Limit.TOKENS_IN_PER_MINUTE),
            "output-tokens": allowances.get(Limit.TOKENS_OUT_PER_MINUTE),
        }
        for name, allowance in shown.items():
            headers += _anthropic(name, allowance, now)
    return headers


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
    found = [allowances[limit] for limit in _TOKENS if limit in allowances]
    return min(found, key=lambda each: each.remaining / max(1, each.limit), default=None)


def _openai(name: str, allowance: Allowance | None) -> Headers:
    if allowance is None:
        return []
    limit, remaining, reset = _OPENAI[name]
    return [
        (limit, b"%d" % allowance.limit),
        (remaining, b"%d" % allowance.remaining),
        (reset, duration(allowance.reset_s).encode()),
    ]


def _anthropic(name: str, allowance: Allowance | None, now: datetime) -> Headers:
    if allowance is None:
        return []
    whole = now + timedelta(seconds=math.ceil(allowance.reset_s))
    prefix = f"anthropic-ratelimit-{name}-".encode()
    return [
        (prefix + b"limit", b"%d" % allowance.limit),
        (prefix + b"remaining", b"%d" % allowance.remaining),
        (prefix + b"reset", whole.strftime("%Y-%m-%dT%H:%M:%SZ").encode()),
    ]
