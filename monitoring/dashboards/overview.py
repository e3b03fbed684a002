"""Is the service well, right now: traffic, errors, latency, and the version that serves, of each model."""

from typing import Final

from grafana_foundation_sdk.models.dashboard import Dashboard

from monitoring.dashboards.board import MODEL, NAME, SERVED_MODEL, VERSION, Uid, board
from monitoring.dashboards.panels import Limits, PanelBuilder, chart, labels, number, timeline
from monitoring.dashboards.promql import Query, increase, quantile_since_start, rate, share, total
from monitoring.faults import SERVER_FAULTS

AVAILABILITY_OBJECTIVE: Final = 0.999
"""Share of requests that do not fail by a fault of the server; the alerts hold it too (deploy/prometheus/rules)."""
FIRST_TOKEN_OBJECTIVE: Final = 0.99
"""Share of streamed answers whose first token comes within 2 s; the alerts hold it too."""

_KNOWN: Final = 'model=~"$model", model!="unknown"'
"""Requests of which the model is known; nearly all of the others ask for a model that is not served."""
_REQUESTS: Final = f"svc_requests_total{{{_KNOWN}}}"
_FAULTS: Final = f'svc_request_errors_total{{{_KNOWN}, reason=~"{SERVER_FAULTS}"}}'
_AVAILABILITY: Final = Limits(warning=AVAILABILITY_OBJECTIVE, bad=0.99)
_FIRST_TOKEN: Final = Limits(warning=FIRST_TOKEN_OBJECTIVE, bad=0.9)
_UP: Final = {0: "does not answer", 1: "up"}
_READY: Final = Query('svc_engine_state{model=~"$model", state="ready"}', NAME)


def overview() -> Dashboard:
    """The dashboard."""
    return board(
        Uid.OVERVIEW,
        "Is the service well: traffic, errors, latency, the version that serves, of each model.",
        [SERVED_MODEL],
        {"Now": _now(), "Traffic": _traffic(), "Latency": _latency(), "Keys": _keys(), "Versions": _versions()},
    )


def _now() -> list[PanelBuilder]:
    failed = _failed(increase(_FAULTS, "model"), increase(_REQUESTS, "model"))
    left = f"1 - {failed} / {1 - AVAILABILITY_OBJECTIVE:.4g}"
    versions = Query(f"svc_model_version_info{MODEL}", f"{VERSION} ({{{{format}}}})")
    build = Query("svc_build_info", "tuneserve {{release}}, {{engine}}, {{device}}")
    return [
        number("Server", "Whether the server answers.", "none", Query("svc_server_up", "server"), names=_UP, span=3),
        number(
            "Engine",
            "Whether the model's engine is ready to answer.",
            "none",
            _READY,
            names={0: "not ready", 1: "ready"},
            span=3,
        ),
        labels("Serving", "The version that is loaded.", versions, span=3),
        labels("Build", "The release of the server, its engine and its device.", build, span=3),
        number(
            "Availability",
            f"Requests without a fault of the server in the time shown; objective of each model: "
            f"{AVAILABILITY_OBJECTIVE:.1%}.",
            "percentunit",
            Query(f"1 - {failed}", NAME),
            limits=_AVAILABILITY,
            span=3,
        ),
        number(
            "Error budget left",
            "What is left of the failures that the objective allows in the time shown; below 0 it is missed.",
            "percentunit",
            Query(left, NAME),
            limits=Limits(warning=0.25, bad=0),
            span=3,
        ),
        number(
            "Drift alarms",
            "How many of three signals say that live traffic is not what the version was judged by.",
            "none",
            Query(total(f"svc_drift_alarm{MODEL}", "model", "version"), VERSION),
            limits=Limits(warning=1, bad=2),
            span=3,
        ),
        number(
            "Held-out quality",
            "Whether the version gives for its held-out set what it gave at registration.",
            "none",
            Query(f"1 - svc_holdout_changed{MODEL}", VERSION),
            names={0: "changed", 1: "as registered"},
            span=3,
        ),
    ]


def _failed(faults: str, requests: str) -> str:
    """Clamped: the first requests of a new series are in no rate, so that there may be fewer requests than faults."""
    return f"clamp_max({share(faults, requests)}, 1)"


def _traffic() -> list[PanelBuilder]:
    failed = _failed(rate(_FAULTS, "model"), rate(_REQUESTS, "model"))
    errors = rate(f"svc_request_errors_total{MODEL}", "model", "reason")
    requests, tokens = f"svc_requests_total{MODEL}", f"svc_tokens_total{MODEL}"
    return [
        chart(
            "Requests",
            "Requests that ended, a second, by version; `unknown` is a model that is not served.",
            "reqps",
            Query(rate(requests, "model", "version"), VERSION),
        ),
        chart(
            "Answers by outcome",
            "Requests that ended, a second, by version and how; a stream that breaks is not complete.",
            "reqps",
            Query(rate(requests, "model", "version", "outcome"), f"{VERSION} {{{{outcome}}}}"),
            stacked=True,
        ),
        chart(
            "Errors by reason",
            "Requests that failed, a second, broken streams among them; docs/metrics.md says what each reason means.",
            "reqps",
            Query(errors, f"{NAME} {{{{reason}}}}"),
            stacked=True,
        ),
        chart(
            "Availability",
            "Requests without a fault of the server, by model; the green line is the objective.",
            "percentunit",
            Query(f"1 - {failed}", NAME),
            limits=_AVAILABILITY,
        ),
        chart(
            "Tokens",
            "Tokens of whole answers, a second: in is the prompt, out is the answer.",
            "none",
            Query(rate(tokens, "model", "version", "direction"), f"{VERSION} {{{{direction}}}}"),
        ),
        chart(
            "Requests running and queued",
            "Requests in the engine, and requests that wait for a change of version or, of keys, for a place.",
            "none",
            Query(f"svc_requests_running{MODEL}", f"{NAME} running"),
            Query(f"svc_requests_queued{MODEL}", f"{NAME} queued"),
        ),
    ]


def _latency() -> list[PanelBuilder]:
    first_tokens = f"svc_time_to_first_token_seconds_count{MODEL}"
    quick = 'svc_time_to_first_token_seconds_bucket{model=~"$model", le="2.0"}'
    in_time = share(rate(quick, "model", "version"), rate(first_tokens, "model", "version"))
    legend = f"{VERSION} {{{{quantile}}}}"
    return [
        chart(
            "Duration of answers",
            "From the request's last byte to the answer's last byte, over the last 5 minutes.",
            "s",
            Query(f"svc_request_duration_quantile_seconds{MODEL}", legend),
            limits=Limits(warning=15, bad=60),
        ),
        chart(
            "Time to first token",
            "From the request's last byte to the first token of a streamed answer, over the last 5 minutes.",
            "s",
            Query(f"svc_time_to_first_token_quantile_seconds{MODEL}", legend),
            limits=Limits(warning=2, bad=10),
        ),
        chart(
            "First tokens in time",
            "Streamed answers whose first token came within 2 s; the green line is the objective.",
            "percentunit",
            Query(in_time, VERSION),
            limits=_FIRST_TOKEN,
        ),
    ]


def _keys() -> list[PanelBuilder]:
    requests, tokens = f"svc_key_requests_total{MODEL}", f"svc_key_tokens_total{MODEL}"
    refused = rate(f"svc_key_refused_total{MODEL}", "model", "key_id", "limit")
    return [
        chart(
            "Requests by key",
            "Requests that an engine took, a second, by the id of the key; no id is a request without a key.",
            "reqps",
            Query(rate(requests, "model", "key_id"), f"{NAME} {{{{key_id}}}}"),
            stacked=True,
        ),
        chart(
            "Tokens by key",
            "Tokens used, a second, by the id of the key: in is the prompt, out is the answer.",
            "none",
            Query(rate(tokens, "model", "key_id", "direction"), f"{NAME} {{{{key_id}}}} {{{{direction}}}}"),
            stacked=True,
        ),
        chart(
            "Requests beyond limits of keys",
            "Requests that were answered 429, a second, by the id of the key and the limit that was reached.",
            "reqps",
            Query(refused, f"{NAME} {{{{key_id}}}} {{{{limit}}}}"),
            stacked=True,
        ),
    ]


def _versions() -> list[PanelBuilder]:
    shown = {0: "no", 1: "yes"}
    waits = quantile_since_start(0.95, f"svc_swap_duration_seconds{MODEL}", "model", "outcome")
    queued = quantile_since_start(0.95, f"svc_swap_queued_requests{MODEL}", "model")
    loads = quantile_since_start(0.95, f"svc_adapter_load_seconds{MODEL}", "model")
    wakes = quantile_since_start(0.95, f"svc_engine_wake_seconds{MODEL}", "model")
    feedback = total(f"svc_feedback_total{MODEL}", "model", "version", "rating")
    versions = Query(total(f"svc_model_version_info{MODEL}", "model", "version", "format"), f"{VERSION} {{{{format}}}}")
    return [
        timeline("Version that serves", "The version that was loaded, over time.", versions, names=shown),
        timeline(
            "Engine state",
            "The state that the model's engine was in, over time.",
            Query(f"svc_engine_state{MODEL}", f"{NAME} {{{{state}}}}"),
            names=shown,
        ),
        chart(
            "Swaps and restarts",
            "Changes of version by outcome, and starts of the engine after it died, since the server started.",
            "none",
            Query(total(f"svc_swaps_total{MODEL}", "model", "outcome"), f"{NAME} swap {{{{outcome}}}}"),
            Query(f"svc_engine_restarts_total{MODEL}", f"{NAME} engine restarted"),
        ),
        chart(
            "Time of a swap",
            "How long requests had to wait in 95 of 100 changes of version since the server started.",
            "s",
            Query(waits, f"{NAME} {{{{outcome}}}}"),
            limits=Limits(warning=10, bad=60),
        ),
        chart(
            "Time to wake an idle model",
            "How long the first request had to wait in 95 of 100 starts of an idle engine since the server started.",
            "s",
            Query(wakes, NAME),
        ),
        chart(
            "Adapters",
            "Those that are loaded, and loads in ten minutes: many loads say that more adapters are in use than fit.",
            "none",
            Query(f"svc_adapters_loaded{MODEL}", f"{NAME} loaded"),
            Query(f"increase(svc_adapter_loads_total{MODEL}[10m])", f"{NAME} loads"),
        ),
        chart(
            "Unverified versions",
            "Those that are served though no probe could verify them on the engine; `svc status` says why.",
            "none",
            Query(f"svc_versions_unverified{MODEL}", NAME),
        ),
        chart(
            "Time to load an adapter",
            "How long the first request for an adapter had to wait in 95 of 100 loads since the server started.",
            "s",
            Query(loads, NAME),
        ),
        chart(
            "Requests queued by a swap",
            "How many requests waited at the end of 95 of 100 changes of version since the server started.",
            "none",
            Query(queued, NAME),
            limits=Limits(warning=64, bad=256),
        ),
        chart(
            "Feedback",
            "Answers that users rated, since the server started.",
            "none",
            Query(feedback, f"{VERSION} {{{{rating}}}}"),
        ),
    ]
