"""Is version B better than version A: the same figures of both, side by side, with 95 % intervals.

Errors are the faults of the server, and evaluations are shown on one held-out set at a time: what a client did wrong,
and how hard a set is, say nothing of a version.
"""

from typing import Final

from grafana_foundation_sdk.models.dashboard import Dashboard, VariableSort

from monitoring.dashboards.board import Choice, Uid, board
from monitoring.dashboards.panels import Column, Limits, PanelBuilder, chart, figures, number
from monitoring.dashboards.promql import (
    Interval,
    Query,
    increase,
    mean,
    quantile_interval,
    quantiles,
    rate,
    share,
    share_interval,
    total,
)
from monitoring.faults import SERVER_FAULTS

_REGISTERED: Final = "svc_registry_version_created_timestamp_seconds"
_EVALUATION: Final = "svc_registry_version_evaluation"
_BOTH: Final = 'model="$model", version=~"$version_a|$version_b"'
_SIDES: Final = {"A": "$version_a", "B": "$version_b"}
_SHARES: Final = "exact_match|accuracy|macro_f1|field_accuracy|schema_valid|valid_json|rouge_.+|chrf"
_LEGEND: Final = "@{{version}}"
_FAULTY: Final = f'reason=~"{SERVER_FAULTS}"'
_LOW, _HIGH = "from (95 %)", "to (95 %)"
_ERRORS: Final = Limits(warning=0.01, bad=0.05)
_DURATION: Final = Limits(warning=15, bad=60)
_FIRST_TOKEN: Final = Limits(warning=2, bad=10)


def versions() -> Dashboard:
    """The dashboard: the oldest version against the newest, until others are chosen."""
    of_model = f'{_REGISTERED}{{model="$model"}}'
    oldest, newest = VariableSort.NUMERICAL_ASC, VariableSort.NUMERICAL_DESC
    return board(
        Uid.VERSIONS,
        "Two versions of a model side by side: traffic, errors, latency, feedback, evaluation.",
        [
            Choice("model", "Model", _REGISTERED, "model"),
            Choice("version_a", "Version A", of_model, "version", sort=oldest),
            Choice("version_b", "Version B", of_model, "version", sort=newest),
            Choice("heldout", "Held-out set", f"{_EVALUATION}{{{_BOTH}}}", "heldout"),
        ],
        {
            "In the time shown": [panel for side, version in _SIDES.items() for panel in _summary(side, version)],
            "Traffic": _traffic(),
            "Latency": _latency(),
            "Feedback": [_feedback()],
            "Evaluation": _evaluations(),
        },
    )


def _summary(side: str, version: str) -> list[PanelBuilder]:
    one = f'model="$model", version="{version}"'
    requests = increase(f"svc_requests_total{{{one}}}", "version")
    faults = increase(f"svc_request_errors_total{{{one}, {_FAULTY}}}", "version")
    tokens = increase(f'svc_tokens_total{{{one}, direction="out"}}', "version")
    duration = quantile_interval(0.95, f"svc_request_duration_seconds{{{one}}}", "version")
    first_token = quantile_interval(0.95, f"svc_time_to_first_token_seconds{{{one}}}", "version")
    return [
        number(
            f"Requests of {side}", f"Requests that version {side} ended.", "short", Query(requests, _LEGEND), span=3
        ),
        number(f"Tokens of {side}", f"Tokens that version {side} answered.", "short", Query(tokens, _LEGEND), span=3),
        number(
            f"Error share of {side}",
            f"Requests of version {side} that failed by a fault of the server, with the 95 % interval of a share; one "
            "cause that fails many at once makes it wider than shown.",
            "percentunit",
            *_queries(share_interval(faults, requests)),
            limits=_ERRORS,
            span=6,
        ),
        number(
            f"Duration of {side}, p95",
            f"95 of 100 answers of version {side} took no longer, with the 95 % interval of that figure.",
            "s",
            *_queries(duration),
            limits=_DURATION,
            span=6,
        ),
        number(
            f"First token of {side}, p95",
            f"95 of 100 streamed answers of version {side} began no later, with the 95 % interval of that figure.",
            "s",
            *_queries(first_token),
            limits=_FIRST_TOKEN,
            span=6,
        ),
    ]


def _queries(interval: Interval) -> list[Query]:
    return [Query(interval.value, _LEGEND), Query(interval.low, _LOW), Query(interval.high, _HIGH)]


def _traffic() -> list[PanelBuilder]:
    requests = rate(f"svc_requests_total{{{_BOTH}}}", "version")
    failed = share(rate(f"svc_request_errors_total{{{_BOTH}, {_FAULTY}}}", "version"), requests)
    tokens = rate(f'svc_tokens_total{{{_BOTH}, direction="out"}}', "version")
    answers = rate(f"svc_request_duration_seconds_count{{{_BOTH}}}", "version")
    return [
        chart("Requests", "Requests that ended, a second.", "reqps", Query(requests, _LEGEND)),
        chart(
            "Error share",
            "Requests that failed by a fault of the server, of all.",
            "percentunit",
            Query(f"clamp_max({failed}, 1)", _LEGEND),
            limits=_ERRORS,
        ),
        chart(
            "Tokens per answer", "How long answers are: tokens of one.", "none", Query(f"{tokens} / {answers}", _LEGEND)
        ),
    ]


def _latency() -> list[PanelBuilder]:
    charts = [
        (
            "Duration of answers",
            "From the request's last byte to the answer's last byte.",
            "svc_request_duration_seconds",
            _DURATION,
        ),
        (
            "Time to first token",
            "From the request's last byte to the first token of a streamed answer.",
            "svc_time_to_first_token_seconds",
            _FIRST_TOKEN,
        ),
        (
            "Time between tokens",
            "Between two tokens of a streamed answer; people read at about 0.25 s.",
            "svc_time_between_tokens_seconds",
            Limits(warning=0.25, bad=1),
        ),
    ]
    made = []
    for title, text, histogram, limits in charts:
        queries = quantiles(f"{histogram}{{{_BOTH}}}", ("version",), _LEGEND)
        average = Query(mean(f"{histogram}{{{_BOTH}}}", "version"), f"{_LEGEND} mean")
        made.append(chart(title, text, "s", *queries, average, limits=limits))
    return made


def _feedback() -> PanelBuilder:
    ratings = total(f"svc_feedback_total{{{_BOTH}}}", "version")
    good = share_interval(total(f'svc_feedback_total{{{_BOTH}, rating="good"}}', "version"), ratings)
    return figures(
        "Good feedback",
        "Answers that were rated since the server started, and the share that was rated good with its 95 % interval.",
        Column("ratings", ratings, "none"),
        *_columns("good", good, "percentunit"),
    )


def _evaluations() -> list[PanelBuilder]:
    return [
        figures(
            "Primary metric",
            "By its name, of the answers to the chosen held-out set at registration, with 95 % intervals; a version "
            "that was judged on another set is not shown.",
            *_columns("value", _evaluation(".+", primary=True), "none"),
        ),
        figures(
            "Answers",
            "Shares of the answers to the chosen held-out set at registration, as those that were exactly right, with "
            "95 % intervals; a version that was judged on another set is not shown.",
            *_columns("share", _evaluation(_SHARES), "percentunit"),
            span=12,
        ),
        figures(
            "Negative log-likelihood",
            "Nats a token of the chosen held-out set's answers at registration, less is better, with 95 % intervals; a "
            "version that was judged on another set is not shown.",
            *_columns("nats a token", _evaluation("nll"), "none"),
            span=12,
        ),
    ]


def _evaluation(metric: str, *, primary: bool = False) -> Interval:
    of_primary = ', primary="true"' if primary else ""
    chosen = f'{{{_BOTH}, heldout="$heldout", metric=~"{metric}"{of_primary}}}'
    value, low, high = (
        f"max by (version, format, metric) ({_EVALUATION}{suffix}{chosen})" for suffix in ("", "_low", "_high")
    )
    return Interval(value, low, high)


def _columns(title: str, interval: Interval, unit: str) -> list[Column]:
    return [Column(title, interval.value, unit), Column(_LOW, interval.low, unit), Column(_HIGH, interval.high, unit)]
