"""Requests log-probabilities of the tokens that an engine samples, and reads them from the answer.

Only chat completions and completions are supported. The prompt is never scored, because that can crash an engine with
adapters.
"""

import json
import math
from collections.abc import Iterable, Iterator
from statistics import fmean

from serving.protocols.route import Route
from serving.protocols.server_sent_events import json_of

_UNKNOWN = -9999.0
"""vLLM's value for a log-probability that is unknown or minus infinity."""
_WITHOUT_LOGPROBS = ("echo", "use_beam_search")
"""Log-probabilities are not requested if one of these fields is set: `echo` would score the prompt, and beams are not
sampled."""


def with_logprobs(route: Route, members: bytes) -> bytes:
    """Return a request that also asks for the log-probabilities of its sampled tokens, without alternatives.

    A request that already asks for them, or that cannot ask for them, is returned unchanged.

    Args:
        members: JSON object for the engine, see `serving.protocols.request.CompletionRequest`.
    """
    if route not in (Route.CHAT_COMPLETIONS, Route.COMPLETIONS):
        return members
    fields = json.loads(members)
    if any(fields.get(name) for name in _WITHOUT_LOGPROBS):
        return members
    if route is Route.CHAT_COMPLETIONS and not fields.get("logprobs"):
        fields["logprobs"] = True  # `top_logprobs` is 0 by default
    elif route is Route.COMPLETIONS and fields.get("logprobs") is None:
        fields["logprobs"] = 0
    else:
        return members
    return json.dumps(fields, separators=(",", ":")).encode("ascii")


def mean_logprob(parts: Iterable[bytes]) -> float | None:
    """Return the mean log-probability of an answer's sampled tokens, in nats per token, or None if the answer contains
    none.

    Args:
        parts: the body, or the events of a stream. The tokens of all choices are counted.
    """
    values = [value for part in parts for value in _logprobs(part) if math.isfinite(value) and value > _UNKNOWN]
    return fmean(values) if values else None


def _logprobs(part: bytes) -> Iterator[float]:
    """Yield the log-probabilities of sampled tokens in a part of an answer."""
    for choice in json_of(part).get("choices") or ():
        logprobs = choice.get("logprobs") or {}
        for token in logprobs.get("content") or ():  # chat completions
            yield token["logprob"]
        for value in logprobs.get("token_logprobs") or ():  # completions; None if unknown
            yield _UNKNOWN if value is None else value
