"""Figures of a running server, read from its metrics page: the same numbers that Prometheus scrapes.

This module depends only on the names of the metrics (docs/metrics.md).
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

QUANTILES = ("0.5", "0.95", "0.99")
SERVER_FAULTS: Final = "overloaded|queue_.*|engine_.*|internal_error"
"""Pattern for the whole `reason` label of `svc_request_errors_total`, as in Prometheus: faults of the server.

Client errors (400, 404, 413, a closed connection) say nothing about a server or a version. The alert rules
(deploy/prometheus/rules) and the dashboards repeat the pattern; docs/metrics.md explains each reason.
"""


@dataclass(slots=True)
class VersionFigures:
    """Figures of one version since the server started, or since the version reappeared after an idle day.

    Quantiles are over the last 5 minutes.

    Attributes:
        requests: answers with any status.
        errors: faults of the server, including broken streams.
        duration_s: quantile to seconds.
        first_token_s: quantile to seconds.
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
    """Versions by name, and failed requests by reason, including client errors and requests without a version."""

    versions: dict[str, VersionFigures]
    errors: dict[str, int]


@dataclass(frozen=True, slots=True)
class Look:
    """One reading of a server.

    Attributes:
        state: the answer of /svc/status.
        figures: read from its metrics.
        drift: for each model the status of each signal and the held-out quality; empty if nothing was checked.
    """

    url: str
    state: Mapping[str, Any]
    figures: Figures
    drift: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


class Rate(NamedTuple):
    """Rates of a version per second."""

    requests: float
    tokens_out: float


def read_figures(exposition: str, models: Collection[str] = ()) -> Figures:
    """Return the figures of a page in Prometheus' text format.

    Args:
        models: names of the models to read; none: all, and requests for no model.
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
    """Return each version's rates; none if the server was restarted in between, because its counters fell."""
    rates = {}
    for name, new in now.versions.items():
        old = before.versions.get(name, VersionFigures(name))
        requests, tokens = new.requests - old.requests, new.tokens_out - old.tokens_out
        if min(requests, tokens) >= 0:
            rates[name] = Rate(requests / seconds, tokens / seconds)
    return rates
