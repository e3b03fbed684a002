"""How the newest training goes, and what the trainings before it made."""

from typing import Final

from grafana_foundation_sdk.models.dashboard import Dashboard

from monitoring.dashboards.board import Choice, Uid, board
from monitoring.dashboards.panels import Column, PanelBuilder, bars, chart, figures, number
from monitoring.dashboards.promql import Query, total

_MODEL: Final = 'model=~"$model"'
_MODELS: Final = '{__name__=~"svc_training_running|svc_registry_version_created_timestamp_seconds"}'
_VERSION: Final = "{{model}}@{{version}} {{format}}"


def training() -> Dashboard:
    """The dashboard."""
    return board(
        Uid.TRAINING,
        "How the newest training goes, and the size and the evaluation of every registered version.",
        [Choice("model", "Model", _MODELS, "model", every=True)],
        {"Newest training": _run(), "Registered versions": _versions()},
    )


def _run() -> list[PanelBuilder]:
    running = Query(f"svc_training_running{{{_MODEL}}}", "{{model}}")
    started = Query(f"svc_training_started_timestamp_seconds{{{_MODEL}}} * 1000", "{{model}}")
    return [
        number(
            "Training",
            "Whether a training runs now, in any stage.",
            "none",
            running,
            names={0: "not running", 1: "running"},
            span=12,
        ),
        number("Started", "When the newest training started.", "dateTimeFromNow", started, span=12),
        chart(
            "Loss",
            "Negative log-likelihood of the training and the held-out examples, in nats a token; less is better.",
            "none",
            Query(f"svc_training_loss{{{_MODEL}}}", "{{model}}"),
            Query(f"svc_training_heldout_loss{{{_MODEL}}}", "{{model}} held-out"),
        ),
        chart(
            "Epoch",
            "How often the training has gone through all examples.",
            "none",
            Query(f"svc_training_epoch{{{_MODEL}}}", "{{model}}"),
        ),
        chart(
            "Learning rate",
            "The size of the steps that the training takes.",
            "sci",
            Query(f"svc_training_learning_rate{{{_MODEL}}}", "{{model}}"),
        ),
    ]


def _versions() -> list[PanelBuilder]:
    created = f"max by (model, version) (svc_registry_version_created_timestamp_seconds{{{_MODEL}}}) * 1000"
    size = total(f"svc_registry_version_size_bytes{{{_MODEL}}}", "model", "version", "format")
    return [
        figures(
            "Primary metric",
            "What each version was judged by first of all at registration, by its name, to be compared where `heldout` "
            "is the same; `base` is the model before training.",
            Column("value", _primary(), "none"),
        ),
        figures(
            "Evaluation",
            "Figures on the held-out examples at registration, to be compared where `heldout` is the same; `base` is "
            "the model before training.",
            Column("exactly right", _evaluation("exact_match"), "percentunit"),
            Column("valid JSON", _evaluation("valid_json"), "percentunit"),
            Column("nats a token", _evaluation("nll"), "none"),
        ),
        figures("Created", "When each version was registered.", Column("created", created, "dateTimeAsIso"), span=12),
        bars("Size", "Size of each version's files, by format.", "bytes", Query(size, _VERSION), span=12),
    ]


def _evaluation(metric: str) -> str:
    selector = f'svc_registry_version_evaluation{{{_MODEL}, metric="{metric}"}}'
    return f"max by (model, version, heldout, format) ({selector})"


def _primary() -> str:
    selector = f'svc_registry_version_evaluation{{{_MODEL}, primary="true"}}'
    return f"max by (model, version, heldout, format, metric) ({selector})"
