"""Is version B better than version A: the same figures of both, side by side."""

from typing import Final

from grafana_foundation_sdk.models.dashboard import Dashboard, VariableSort

from monitoring.dashboards.board import Choice, Uid, board
from monitoring.dashboards.panels import Limits, PanelBuilder, bars, chart, number
from monitoring.dashboards.promql import Query, increase, mean, quantiles, rate, share, total

_REGISTERED: Final = "svc_registry_version_created_timestamp_seconds"
_BOTH: Final = 'model="$model", version=~"$version_a|$version_b"'
_SIDES: Final = {"A": "$version_a", "B": "$version_b"}
_LEGEND: Final = "@{{version}}"
_FAILED: Final = 'status=~"[45].."'
_ERRORS: Final = Limits(warning=0.01, bad=0.05)


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
        ],
        {
            "In the time shown": [panel for side, version in _SIDES.items() for panel in _summary(side, version)],
            "Traffic": _traffic(),
            "Latency": _latency(),
            "Quality": _quality(),
        },
    )


def _summary(side: str, version: str) -> list[PanelBuilder]:
    one = f'model="$model", version="{version}"'
    requests = increase(f"svc_requests_total{{{one}}}", "version")
    failed = share(increase(f"svc_requests_total{{{one}, {_FAILED}}}", "version"), requests)
    tokens = increase(f'svc_tokens_total{{{one}, direction="out"}}', "version")
    return [
        number(f"Requests of {side}", f"Requests that version {side} ended.", "short", Query(requests, _LEGEND)),
        number(
            f"Error share of {side}",
            f"Requests of version {side} that ended with status 400 and above.",
            "percentunit",
            Query(failed, _LEGEND),
            limits=_ERRORS,
        ),
        number(f"Tokens of {side}", f"Tokens that version {side} answered.", "short", Query(tokens, _LEGEND)),
    ]


def _traffic() -> list[PanelBuilder]:
    requests = rate(f"svc_requests_total{{{_BOTH}}}", "version")
    failed = share(rate(f"svc_requests_total{{{_BOTH}, {_FAILED}}}", "version"), requests)
    tokens = rate(f'svc_tokens_total{{{_BOTH}, direction="out"}}', "version")
    answers = rate(f"svc_request_duration_seconds_count{{{_BOTH}}}", "version")
    return [
        chart("Requests", "Requests that ended, a second.", "reqps", Query(requests, _LEGEND)),
        chart(
            "Error share",
            "Requests that ended with status 400 and above, of all.",
            "percentunit",
            Query(failed, _LEGEND),
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
            Limits(warning=15, bad=60),
        ),
        (
            "Time to first token",
            "From the request's last byte to the first token of a streamed answer.",
            "svc_time_to_first_token_seconds",
            Limits(warning=2, bad=10),
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


def _quality() -> list[PanelBuilder]:
    ratings = total(f"svc_feedback_total{{{_BOTH}}}", "version")
    good = share(total(f'svc_feedback_total{{{_BOTH}, rating="good"}}', "version"), ratings)
    figures = f"svc_registry_version_evaluation{{{_BOTH}"
    legend = f"{_LEGEND} {{{{format}}}}"
    return [
        bars(
            "Good feedback",
            "Rated answers that were rated good, since the server started.",
            "percentunit",
            Query(good, _LEGEND),
            limits=Limits(warning=0.8, bad=0.5),
            span=4,
        ),
        bars("Ratings", "Answers that were rated, since the server started.", "none", Query(ratings, _LEGEND), span=4),
        bars(
            "Evaluation: answers",
            "Held-out answers that were exactly right, and that were valid JSON, when the version was registered.",
            "percentunit",
            Query(f'{figures}, metric=~"exact_match|valid_json"}}', f"{legend} {{{{metric}}}}"),
            limits=Limits(warning=0.8, bad=0.5),
        ),
        bars(
            "Evaluation: negative log-likelihood",
            "Nats a token of the held-out answers when the version was registered; less is better.",
            "none",
            Query(f'{figures}, metric="nll"}}', legend),
        ),
    ]
