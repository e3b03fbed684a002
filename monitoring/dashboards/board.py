"""What all dashboards have in common: the data source and the model to choose, links to one another, a mark at each
change of version."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.models import dashboard

from monitoring.dashboards.panels import DATASOURCE, PanelBuilder

_TAG = "tuneserve"


class Uid(Enum):
    """The dashboards' lasting addresses, each with its title."""

    OVERVIEW = ("tuneserve-overview", "tuneserve: overview")
    VERSIONS = ("tuneserve-versions", "tuneserve: versions")
    DRIFT = ("tuneserve-drift", "tuneserve: drift")
    ENGINE = ("tuneserve-engine", "tuneserve: engine")
    TRAINING = ("tuneserve-training", "tuneserve: training")


@dataclass(frozen=True, slots=True)
class Choice:
    """A template variable: one of the values of a label.

    Attributes:
        series: selector of the series that have the label.
        every: the choice may be of all values; compare it with `=~` then.
    """

    name: str
    title: str
    series: str
    label: str
    every: bool = False
    sort: dashboard.VariableSort = dashboard.VariableSort.ALPHABETICAL_ASC


MODEL: Final = '{model=~"$model"}'
"""Matchers of the chosen model, or of all."""
NAME: Final = "{{model}}"
"""A series' name: the model."""
VERSION: Final = "{{model}}@{{version}}"
"""A series' name: the version."""
SERVED_MODEL: Final = Choice("model", "Model", "svc_requests_running", "model", every=True)
"""Also one that waits for its first engine, and has no version yet."""
_CHANGES: Final = f"svc_model_version_info{MODEL} unless svc_model_version_info{MODEL} offset 1m"


def board(
    uid: Uid, text: str, choices: Sequence[Choice], sections: Mapping[str, Sequence[PanelBuilder]]
) -> dashboard.Dashboard:
    """One dashboard.

    Args:
        text: one sentence: which question it answers.
        sections: title of a row to its panels.
    """
    address, title = uid.value
    builder = builders.Dashboard(title).uid(address).description(text).tags([_TAG]).editable()
    builder.time("now-1h", "now").refresh("10s").timezone("browser").tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
    builder.with_variable(builders.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    for choice in choices:
        builder.with_variable(_variable(choice))
    for other in Uid:
        if other is not uid:
            builder.link(_link(*other.value))
    builder.annotation(
        builders.AnnotationQuery()
        .name("Version changes")
        .datasource(DATASOURCE)
        .enable(True)
        .icon_color("purple")
        .expr(_CHANGES)
    )
    for section, panels in sections.items():
        builder.with_row(builders.Row(section))
        for panel in panels:
            builder.with_panel(panel)
    return _numbered(builder.build())


def _variable(choice: Choice) -> builders.QueryVariable:
    variable = (
        builders.QueryVariable(choice.name)
        .label(choice.title)
        .datasource(DATASOURCE)
        .query(f"label_values({choice.series}, {choice.label})")
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(choice.sort)
        .multi(False)
    )
    return variable.include_all(True).all_value(".*") if choice.every else variable


def _link(uid: str, title: str) -> builders.DashboardLink:
    link = builders.DashboardLink(title).type(dashboard.DashboardLinkType.LINK).url(f"/d/{uid}")
    return link.include_vars(True).keep_time(True)


def _numbered(made: dashboard.Dashboard) -> dashboard.Dashboard:
    """Grafana gives ids to panels that have none, others at each import: a link to a panel would not last."""
    for number, panel in enumerate(made.panels or [], start=1):
        panel.id_val = number
    return made
