"""Response headers with a key's remaining limits, in the formats that OpenAI's and Anthropic's clients read.

OpenAI has a single header for tokens, which shows the token limit with the smallest remaining share. Anthropic also has
separate headers for input and output tokens, and gives the time at which a limit is fully reset, while OpenAI gives the
duration until then.
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from serving.admission.rate_limiter import Allowance, Limit
from serving.protocols.route import ANTHROPIC_PATHS

_REQUESTS = Limit.REQUESTS_PER_MINUTE
_TOKENS = (Limit.TOKENS_IN_PER_MINUTE, Limit.TOKENS_OUT_PER_MINUTE, Limit.TOKENS_PER_DAY)


def rate_limit_headers(
    allowances: Mapping[Limit, Allowance], path: str, now: datetime | None = None
) -> list[tuple[bytes, bytes]]:
    """Return the rate limit headers for a response to `path`, covering all limits of the key."""
    requests, tokens = allowances.get(_REQUESTS), _tightest(allowances)
    headers: list[tuple[bytes, bytes]] = []
    for name, allowance in ((b"requests", requests), (b"tokens", tokens)):
        if allowance:
            headers += [
                (b"x-ratelimit-limit-" + name, b"%d" % allowance.limit),
                (b"x-ratelimit-remaining-" + name, b"%d" % allowance.remaining),
                (b"x-ratelimit-reset-" + name, duration(allowance.reset_s).encode()),
            ]
    if path not in ANTHROPIC_PATHS:
        return headers
    now = now or datetime.now(UTC)
    shown = {
        b"requests": requests,
        b"tokens": tokens,
        b"input-tokens": allowances.get(Limit.TOKENS_IN_PER_MINUTE),
        b"output-tokens": allowances.get(Limit.TOKENS_OUT_PER_MINUTE),
    }
    for name, allowance in shown.items():
        if allowance:
            full_at = now + timedelta(seconds=math.ceil(allowance.reset_s))
            prefix = b"anthropic-ratelimit-" + name
            headers += [
                (prefix + b"-limit", b"%d" % allowance.limit),
                (prefix + b"-remaining", b"%d" % allowance.remaining),
                (prefix + b"-reset", full_at.strftime("%Y-%m-%dT%H:%M:%SZ").encode()),
            ]
    return headers


def duration(seconds: float) -> str:
    """Return a duration, rounded up, in OpenAI's format: `120ms`, `1s`, `6m0s`, `1h0m0s`."""
    if seconds < 1:
        milliseconds = math.ceil(seconds * 1000)
        return f"{milliseconds}ms" if 0 < milliseconds < 1000 else f"{milliseconds // 1000}s"
    minutes, rest_s = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{rest_s}s"
    return f"{minutes}m{rest_s}s" if minutes else f"{rest_s}s"


def _tightest(allowances: Mapping[Limit, Allowance]) -> Allowance | None:
    limits = [allowances[limit] for limit in _TOKENS if limit in allowances]
    return min(limits, key=lambda allowance: allowance.remaining / (allowance.limit or 1), default=None)
