"""The kinds of panel that the dashboards are made of: every one has a title, a sentence, a unit and thresholds.

Knows Grafana's model and no metric.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from grafana_foundation_sdk.builders import bargauge, common, prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models import dashboard
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    BigValueTextMode,
    GraphTresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    ScaleDistribution,
    StackingMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from monitoring.dashboards.promql import Query

DATASOURCE: Final = dashboard.DataSourceRef(type_val="prometheus", uid="$datasource")
PanelBuilder = Builder[dashboard.Panel]

_GOOD, _WARNING, _BAD = "green", "orange", "red"
_STAT_HEIGHT, _CHART_HEIGHT = 4, 8


@dataclass(frozen=True, slots=True)
class Limits:
    """Where a value begins to be worth a look, and where it is bad.

    Attributes:
        warning: in the panel's unit; bad is beyond it in the same direction.
        bad: below `warning` where less is worse.
    """

    warning: float
    bad: float


class Axis(Enum):
    """What values are drawn along."""

    FROM_ZERO = "from zero"
    FREE = "free"
    """For values on both sides of 0."""
    LOGARITHMIC = "logarithmic"
    """For values above 0 that are powers of ten apart."""


def chart(
    title: str,
    text: str,
    unit: str,
    *queries: Query,
    limits: Limits | None = None,
    stacked: bool = False,
    axis: Axis = Axis.FROM_ZERO,
    span: int = 8,
) -> PanelBuilder:
    """Lines over time; limits are drawn as lines.

    Args:
        text: one sentence in plain words.
        unit: Grafana's id of it.
        span: width; a row has 24.
    """
    legend = common.VizLegendOptions().show_legend(True).display_mode(LegendDisplayMode.TABLE)
    style = GraphTresholdsStyleMode.LINE if limits else GraphTresholdsStyleMode.OFF
    panel = (
        timeseries.Panel()
        .title(title)
        .description(text)
        .unit(unit)
        .datasource(DATASOURCE)
        .height(_CHART_HEIGHT)
        .span(span)
        .fill_opacity(20 if stacked else 0)
        .show_points(VisibilityMode.AUTO)
        .legend(legend.placement(LegendPlacement.BOTTOM).calcs(["lastNotNull", "max"]))
        .thresholds(_thresholds(limits))
        .thresholds_style(common.GraphThresholdsStyleConfig().mode(style))
        .targets(_targets(queries))
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    if axis is Axis.LOGARITHMIC:
        panel.scale_distribution(common.ScaleDistributionConfig().type(ScaleDistribution.LOG).log(10))
    # From 0 on, 99.9 % and 99 % look the same.
    less_is_worse = limits is not None and limits.bad < limits.warning
    return panel.min(0) if axis is Axis.FROM_ZERO and not less_is_worse else panel


def number(
    title: str,
    text: str,
    unit: str,
    *queries: Query,
    limits: Limits | None = None,
    names: Mapping[int, str] | None = None,
    span: int = 4,
) -> PanelBuilder:
    """The newest value of each series.

    Args:
        names: what is shown for 0 and for 1; 0 is bad and 1 is good.
    """
    panel = (
        stat.Panel()
        .title(title)
        .description(text)
        .unit(unit)
        .datasource(DATASOURCE)
        .height(_STAT_HEIGHT)
        .span(span)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .color_mode(BigValueColorMode.VALUE)
        .graph_mode(BigValueGraphMode.NONE)
        .thresholds(_thresholds(Limits(warning=1, bad=0) if names else limits))
        .targets(_targets(queries, instant=True))
    )
    return panel.mappings(_names(names)) if names else panel


def labels(title: str, text: str, query: Query, *, span: int = 4) -> PanelBuilder:
    """The labels of series whose value is always 1."""
    return (
        stat.Panel()
        .title(title)
        .description(text)
        .unit("none")
        .datasource(DATASOURCE)
        .height(_STAT_HEIGHT)
        .span(span)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .color_mode(BigValueColorMode.NONE)
        .graph_mode(BigValueGraphMode.NONE)
        .text_mode(BigValueTextMode.NAME)
        .thresholds(_thresholds(None))
        .targets(_targets([query], instant=True))
    )


def timeline(
    title: str,
    text: str,
    query: Query,
    *,
    names: Mapping[int, str],
    off: str = "transparent",
    span: int = 8,
) -> PanelBuilder:
    """A band for each series, coloured while its value is 1.

    Args:
        off: colour while it is 0.
    """
    return (
        statetimeline.Panel()
        .title(title)
        .description(text)
        .unit("none")
        .datasource(DATASOURCE)
        .height(_CHART_HEIGHT)
        .span(span)
        .show_value(VisibilityMode.NEVER)
        .mappings(_names(names, off=off))
        .thresholds(_thresholds(None))
        .targets(_targets([query]))
    )


def bars(
    title: str, text: str, unit: str, *queries: Query, limits: Limits | None = None, span: int = 8
) -> PanelBuilder:
    """The newest value of each series as the length of a bar."""
    return (
        bargauge.Panel()
        .title(title)
        .description(text)
        .unit(unit)
        .datasource(DATASOURCE)
        .height(_CHART_HEIGHT)
        .span(span)
        .min(0)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(_thresholds(limits))
        .targets(_targets(queries, instant=True))
    )


@dataclass(frozen=True, slots=True)
class Column:
    """A column of figures in a table; rows are made of the labels of all queries.

    Attributes:
        expr: an instant query; all columns of a table are aggregated by labels of the same names.
        unit: Grafana's id of it.
    """

    title: str
    expr: str
    unit: str


def figures(title: str, text: str, *columns: Column, span: int = 24) -> PanelBuilder:
    """A table with a row for each set of labels and a column for each query."""
    queries = [Query(column.expr, column.title) for column in columns]
    values = {f"Value #{_ref_id(index)}": column.title for index, column in enumerate(columns)}
    organize = {"excludeByName": {"Time": True}, "indexByName": {}, "renameByName": values}
    panel = (
        table.Panel()
        .title(title)
        .description(text)
        .unit("none")
        .datasource(DATASOURCE)
        .height(_CHART_HEIGHT)
        .span(span)
        .thresholds(_thresholds(None))
        .show_header(True)
        .targets(_targets(queries, instant=True, shape=PromQueryFormat.TABLE))
        .with_transformation(dashboard.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(dashboard.DataTransformerConfig(id_val="organize", options=organize))
    )
    for column in columns:
        panel.override_by_name(column.title, [dashboard.DynamicConfigValue(id_val="unit", value=column.unit)])
    return panel


def _targets(
    queries: Sequence[Query], *, instant: bool = False, shape: PromQueryFormat = PromQueryFormat.TIME_SERIES
) -> list[Builder[Dataquery]]:
    targets: list[Builder[Dataquery]] = []
    for index, query in enumerate(queries):
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(_ref_id(index))
        target.datasource(DATASOURCE).format(shape)
        targets.append(target.instant() if instant else target.range())
    return targets


def _ref_id(index: int) -> str:
    return chr(ord("A") + index)


def _thresholds(limits: Limits | None) -> builders.ThresholdsConfig:
    """From minus infinity upwards, as Grafana reads them."""
    steps: list[tuple[float | None, str]]
    if limits is None:
        steps = [(None, _GOOD)]
    elif limits.bad > limits.warning:
        steps = [(None, _GOOD), (limits.warning, _WARNING), (limits.bad, _BAD)]
    else:
        steps = [(None, _BAD), (limits.bad, _WARNING), (limits.warning, _GOOD)]
    config = builders.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE)
    return config.steps([dashboard.Threshold(value=value, color=color) for value, color in steps])


def _names(texts: Mapping[int, str], off: str = _BAD) -> list[dashboard.ValueMapping]:
    colours = {0: off, 1: _GOOD}
    options = {
        str(value): dashboard.ValueMappingResult(text=text, color=colours[value], index=value)
        for value, text in texts.items()
    }
    return [dashboard.ValueMap(options=options)]
