"""The figures of a running server, read from its metrics page: the same numbers that Prometheus sees.

Knows the names of the metrics (docs/metrics.md) and nothing of how they are made.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from monitoring.faults import is_fault

QUANTILES = ("0.5", "0.95", "0.99")


@dataclass(slots=True)
class VersionFigures:
    """What one version did since the server started; the quantiles are over the last 5 minutes.

    Attributes:
        requests: answers of any status.
        errors: faults of the server (monitoring.faults), broken streams among them.
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
    """All versions by name, and failed requests by reason: clients' own and those without a version included."""

    versions: dict[str, VersionFigures]
    errors: dict[str, int]


@dataclass(frozen=True, slots=True)
class Look:
    """One look at a server.

    Attributes:
        state: the server's own word, from /svc/status.
        figures: what its metrics say.
        drift: of each model each signal's status, and the held-out quality; empty where nothing was checked.
    """

    url: str
    state: Mapping[str, Any]
    figures: Figures
    drift: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def read_figures(exposition: str, models: Collection[str] = ()) -> Figures:
    """Reads a page in Prometheus' text format.

    Args:
        models: names of those whose figures are wanted; none: of all, and of requests that were for no model.
    """
    versions: dict[str, VersionFigures] = {}
    errors: dict[str, int] = {}
    for sample in _samples(exposition):
        if models and sample.labels.get("model") not in models:
            continue
        if sample.name == "svc_request_errors_total":
            reason = sample.labels["reason"]
            errors[reason] = errors.get(reason, 0) + int(sample.value)
        if sample.labels.get("version"):
            label = f"{sample.labels['model']}@{sample.labels['version']}"
            _add(versions.setdefault(label, VersionFigures(label)), sample)
    return Figures(versions, {reason: count for reason, count in errors.items() if count})


def _add(figures: VersionFigures, sample: Sample) -> None:
    labels = sample.labels
    match sample.name:
        case "svc_requests_total":
            figures.requests += int(sample.value)
        case "svc_request_errors_total" if is_fault(labels["reason"]):
            figures.errors += int(sample.value)
        case "svc_tokens_total" if labels["direction"] == "in":
            figures.tokens_in += int(sample.value)
        case "svc_tokens_total":
            figures.tokens_out += int(sample.value)
        case "svc_request_duration_quantile_seconds":
            figures.duration_s[labels["quantile"]] = sample.value
        case "svc_time_to_first_token_quantile_seconds":
            figures.first_token_s[labels["quantile"]] = sample.value


def _samples(exposition: str) -> Iterable[Sample]:
    for family in text_string_to_metric_families(exposition):
        yield from family.samples
