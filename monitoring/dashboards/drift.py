"""Is live traffic still what the version was judged by, and is the version still as good as it was then?"""

from typing import Final

from grafana_foundation_sdk.models.dashboard import Dashboard

from monitoring.dashboards.board import SERVED_MODEL, VERSION, Uid, board
from monitoring.dashboards.panels import Axis, Limits, PanelBuilder, chart, number, timeline
from monitoring.dashboards.promql import Query

_MODEL: Final = 'model=~"$model"'
_SHIFT: Final = Limits(warning=0.1, bad=0.2)
"""Of the population stability index, by custom."""
_SMALLEST_P: Final = "1e-9"
"""Smaller ones are drawn as this: a logarithmic axis has no 0."""
_STEADY: Final = {0: "drift", 1: "steady"}
_SIGNAL: Final = f"{VERSION} {{{{signal}}}}"
_FEATURE: Final = f"{VERSION} {{{{feature}}}}"


def drift() -> Dashboard:
    """The dashboard."""
    return board(
        Uid.DRIFT,
        "Is live traffic still what the version was judged by, and is the version still as good.",
        [SERVED_MODEL],
        {
            "Now": _now(),
            "Signals": _signals(),
            "Input": _input(),
            "Output": _features("output", "answers"),
            "People": _features("people", "ratings"),
            "Held-out quality": _quality(),
        },
    )


def _now() -> list[PanelBuilder]:
    return [
        number(
            "Live traffic",
            "Whether each signal is what the version was judged by; one that is not shown is off or has too little to "
            "compare, and `svc drift` says which.",
            "none",
            Query(_steady(), _SIGNAL),
            names=_STEADY,
            span=9,
        ),
        number(
            "Held-out quality",
            "Whether the version gives for its held-out set what it gave at registration; changed is a fault of "
            "serving.",
            "none",
            Query(f"1 - svc_holdout_changed{{{_MODEL}}}", VERSION),
            names={0: "changed", 1: "as registered"},
            span=3,
        ),
        number(
            "Last check",
            "When live traffic was last compared.",
            "dateTimeFromNow",
            Query(f"svc_drift_checked_timestamp_seconds{{{_MODEL}}} * 1000", VERSION),
            span=3,
        ),
        *_newest_runs(),
    ]


def _newest_runs() -> list[PanelBuilder]:
    completed, failed = _runs("completed"), _runs("failed")
    interval = f"svc_holdout_interval_seconds{{{_MODEL}}}"
    return [
        number(
            "Last run",
            "When the held-out set was last asked to its end.",
            "dateTimeFromNow",
            Query(f"{completed} * 1000 > 0", VERSION),
            span=3,
        ),
        number(
            "Next run",
            "When the held-out set is to be asked again; far in the past, it is overdue.",
            "dateTimeFromNow",
            Query(f"(({completed} > 0) + ignoring (outcome) {interval}) * 1000", VERSION),
            span=3,
        ),
        number(
            "Failed run",
            "Whether the newest run of the held-out set failed.",
            "none",
            Query(f"{completed} >= bool ignoring (outcome) {failed}", VERSION),
            names={0: "failed", 1: "none"},
            span=3,
        ),
    ]


def _signals() -> list[PanelBuilder]:
    return [
        timeline(
            "Drift over time",
            "Each signal while it was compared; red is an alarm, a gap is a time in which it was off or waited.",
            Query(_steady(), _SIGNAL),
            names=_STEADY,
            off="red",
            span=12,
        ),
        chart(
            "Looked at",
            "Requests, and for people ratings, that were compared since the version serves.",
            "short",
            Query(f"svc_drift_items{{{_MODEL}}}", _SIGNAL),
            span=12,
        ),
    ]


def _input() -> list[PanelBuilder]:
    return [
        chart(
            "Live prompts told from the reference",
            "Area under the ROC curve of a classifier between the two: at 0.5 it cannot tell them apart, at 1 always.",
            "none",
            Query(f'svc_drift_score{{{_MODEL}, signal="input", feature="domain_classifier"}}', VERSION),
        ),
        *_features("input", "prompts", span=8),
    ]


def _features(signal: str, things: str, *, span: int = 12) -> list[PanelBuilder]:
    of_signal = f'{_MODEL}, signal="{signal}"'
    return [
        chart(
            f"Shift of {things}",
            f"Population stability index of what can be read off {things}; by custom above 0.1 is worth a look, above "
            "0.2 a shift, but chance alone gives 0.1 in a window of 100 and 0.4 in one of 10: see the surprise too.",
            "none",
            Query(f'svc_drift_score{{{of_signal}, feature!="domain_classifier"}}', _FEATURE),
            limits=_SHIFT,
            span=span,
        ),
        chart(
            f"Surprise of {things}",
            f"p-value: how often {things} would differ so by chance alone; an alarm needs far less than 0.05, since it "
            "is looked so often.",
            "sci",
            Query(f"clamp_min(svc_drift_pvalue{{{of_signal}}}, {_SMALLEST_P})", _FEATURE),
            axis=Axis.LOGARITHMIC,
            span=span,
        ),
    ]


def _quality() -> list[PanelBuilder]:
    legend = f"{VERSION} {{{{when}}}}"
    nll = f"job_instance_model_version:svc_holdout_nll:change{{{_MODEL}}}"
    score = f"job_instance_model_version_metric:svc_holdout_score:change{{{_MODEL}}}"
    exact_match = f"job_instance_model_version:svc_holdout_exact_match:change{{{_MODEL}}}"
    return [
        chart(
            "Negative log-likelihood",
            "Nats a token of the held-out answers, now and at registration; less is better.",
            "none",
            Query(f"svc_holdout_nll{{{_MODEL}}}", legend),
        ),
        chart(
            "Primary metric",
            "The version's primary metric on the held-out answers, by its name, now and at registration.",
            "none",
            Query(f"svc_holdout_score{{{_MODEL}}}", f"{VERSION} {{{{metric}}}} {{{{when}}}}"),
        ),
        chart(
            "Exactly right",
            "Held-out answers that are exactly right, now and at registration.",
            "percentunit",
            Query(f"svc_holdout_exact_match{{{_MODEL}}}", legend),
        ),
        chart(
            "Examples asked",
            "Held-out examples of the newest run that went to its end.",
            "none",
            Query(f"svc_holdout_examples{{{_MODEL}}}", VERSION),
        ),
        chart(
            "Change of negative log-likelihood",
            "Nats a token since registration; rounding gives less than 0.02 in the mean.",
            "none",
            Query(nll, VERSION),
            axis=Axis.FREE,
        ),
        chart(
            "Change of the primary metric",
            "Since registration, in the metric's own unit.",
            "none",
            Query(score, f"{VERSION} {{{{metric}}}}"),
            axis=Axis.FREE,
        ),
        chart(
            "Change of exactly right answers",
            "Share of the held-out answers that were won, or below 0 lost, since registration.",
            "percentunit",
            Query(exact_match, VERSION),
            axis=Axis.FREE,
        ),
        chart(
            "Surprise of the change",
            "p-value: how often rounding alone would change so much; below 0.0001 of the log-likelihood or the primary "
            "metric, the version counts as changed.",
            "sci",
            Query(f"clamp_min(svc_holdout_pvalue{{{_MODEL}}}, {_SMALLEST_P})", f"{VERSION} {{{{metric}}}}"),
            axis=Axis.LOGARITHMIC,
        ),
    ]


def _steady() -> str:
    """1 while a signal is steady, 0 in an alarm, nothing while it is not compared."""
    return f"1 - svc_drift_alarm{{{_MODEL}}} and svc_drift_watched{{{_MODEL}}} == 1"


def _runs(outcome: str) -> str:
    return f'svc_holdout_run_timestamp_seconds{{{_MODEL}, outcome="{outcome}"}}'
