"""Extracts dashboard queries as Grafana would send them, for tests with a real Prometheus."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_LABEL_VALUES = re.compile(r"label_values\((.+), (\w+)\)")
_VARIABLE = re.compile(r"\$\{?(\w+)\}?")


class PanelQuery(NamedTuple):
    """One dashboard query.

    Attributes:
        panel: title of the panel; `variable NAME` for a template variable, whose values come from a label of
            the series that `expr` returns; `annotation NAME` for an annotation.
    """

    dashboard: str
    panel: str
    expr: str


def panel_queries(
    folder: Path, values: Mapping[str, str], *, rate_interval: str = "1m", shown: str = "1h"
) -> list[PanelQuery]:
    """Return every query of a folder's dashboards, with all variables replaced.

    Args:
        values: values of the template variables, keyed by variable; `model`, `version_a`, `version_b`,
            `heldout`.
        rate_interval: value of `$__rate_interval`, at least four scrapes.
        shown: value of `$__range`, the time range of the dashboard.

    Raises:
        KeyError: a query contains a variable without a value.
    """
    known = {**values, "__rate_interval": rate_interval, "__range": shown}
    queries = []
    for path in sorted(folder.glob("*.json")):
        for title, expr in _queries(json.loads(path.read_text("utf-8"))):
            queries.append(PanelQuery(path.stem, title, _VARIABLE.sub(lambda name: known[name[1]], expr)))
    return queries


def _queries(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            query = variable["query"]["query"] if isinstance(variable["query"], dict) else variable["query"]
            match = _LABEL_VALUES.fullmatch(query)
            assert match, query
            yield f"variable {variable['name']}", f"count by ({match[2]}) ({match[1]})"
    for annotation in dashboard["annotations"]["list"]:
        if not annotation.get("builtIn"):
            yield f"annotation {annotation['name']}", annotation["expr"]
