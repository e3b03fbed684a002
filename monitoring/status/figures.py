"""Statistics of a running server, read from the same metrics page that Prometheus scrapes.

This module depends only on the metric names (docs/metrics.md).
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

QUANTILES = ("0.5", "0.95", "0.99")
SERVER_FAULTS: Final = "overloaded|queue_.*|engine_.*|internal_error"
"""Pattern for error reasons that are the server's fault. As in Prometheus, the pattern must match the whole `reason`
label of `svc_request_errors_total`.

Client errors (400, 404, 413, a closed connection) say nothing about a server or a version. The alert rules
(deploy/prometheus/rules) and the dashboards repeat this pattern. docs/metrics.md explains each reason."""


@dataclass(slots=True)
class VersionFigures:
    """Request statistics of one version since the server started. They are reset to 0 after a day without requests.

    Attributes:
        requests: finished requests, regardless of their status.
        errors: requests that failed because of a server fault, including broken streams.
        duration_s: seconds until an answer was complete, one value per entry of `QUANTILES`, over the last 5
            minutes.
        first_token_s: seconds until the first token of a streamed answer, in the same form as `duration_s`.
    """

    version: str
    requests: int = 0
    errors: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    duration_s: dict[str, float] = field(default_factory=dict)
    first_token_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Figures:
    """Request statistics of all versions, read from a metrics page.

    Attributes:
        versions: statistics of each version, keyed by its name, such as `tickets@2`.
        errors: failed requests by reason, including client errors and requests that reached no version.
    """

    versions: dict[str, VersionFigures]
    errors: dict[str, int]


@dataclass(frozen=True, slots=True)
class StatusView:
    """A snapshot of a server's status, request statistics and drift.

    Attributes:
        state: the response of /svc/status.
        figures: the statistics read from the server's metrics page.
        drift: for each model, the statuses of its drift signals and held-out quality. Empty for a model that
            was not checked, and for a remote server.
    """

    url: str
    state: Mapping[str, Any]
    figures: Figures
    drift: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


class Rate(NamedTuple):
    """Number of requests that a version handles per second, and number of tokens that it generates per second."""

    requests: float
    tokens_out: float


def read_figures(exposition: str, models: Collection[str] = ()) -> Figures:
    """Parse a metrics page in Prometheus' text format and return the statistics in it.

    Args:
        models: names of the models to include. If empty, all models are included, and so are requests for unknown
            models.
    """
    versions: dict[str, VersionFigures] = {}
    errors = Counter[str]()
    for sample in (sample for family in text_string_to_metric_families(exposition) for sample in family.samples):
        labels = sample.labels
        if models and labels.get("model") not in models:
            continue
        if sample.name == "svc_request_errors_total":
            errors[labels["reason"]] += int(sample.value)
        if labels.get("version"):
            name = f"{labels['model']}@{labels['version']}"
            _add(versions.setdefault(name, VersionFigures(name)), sample.name, labels, sample.value)
    return Figures(versions, dict(+errors))


def _add(figures: VersionFigures, metric: str, labels: Mapping[str, str], value: float) -> None:
    match metric:
        case "svc_requests_total":
            figures.requests += int(value)
        case "svc_request_errors_total" if re.fullmatch(SERVER_FAULTS, labels["reason"]):
            figures.errors += int(value)
        case "svc_tokens_total" if labels["direction"] == "in":
            figures.tokens_in += int(value)
        case "svc_tokens_total":
            figures.tokens_out += int(value)
        case "svc_request_duration_quantile_seconds":
            figures.duration_s[labels["quantile"]] = value
        case "svc_time_to_first_token_quantile_seconds":
            figures.first_token_s[labels["quantile"]] = value


def rates_between(before: Figures, now: Figures, seconds: float) -> dict[str, Rate]:
    """Return each version's request and token rates between two readings.

    A version whose counters decreased is skipped, because the server restarted in between.

    Args:
        seconds: time between the readings.
    """
    rates = {}
    for name, new in now.versions.items():
        old = before.versions.get(name, VersionFigures(name))
        requests, tokens = new.requests - old.requests, new.tokens_out - old.tokens_out
        if min(requests, tokens) >= 0:
            rates[name] = Rate(requests / seconds, tokens / seconds)
    return rates
