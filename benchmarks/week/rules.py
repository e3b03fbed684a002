"""Evaluates the alert rules over the week's metrics pages with promtool.

The rules in deploy/prometheus/rules are used unchanged. The rules for service level objectives, which
look back three days and have no `for`, are evaluated every two minutes and separately for each model,
because a query in promtool's tests loads at most 10,000 samples, and three days are 4,320 per series.
All other rules are evaluated every minute.
"""

import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from benchmarks.week.server import Labels, Page
from benchmarks.week.timetable import MAIN, MODELS
from svc.errors import SvcError
from tests.deploy.prometheus_rules import groups

PROMTOOL = Path(".venv") / "prometheus" / "bin" / "promtool"
TARGET = (("instance", "127.0.0.1:9464"), ("job", "tuneserve"), ("namespace", "production"))
_SLO_ALERTS = "tuneserve_slo"
_LAG = "svc_event_loop_lag_seconds_bucket"
"""The only histogram whose buckets are all read by alerts."""
_COUNTERS = ("_total", "_count", "_bucket")
_PROCESSES = 2
_FIRING = 'ALERTS{alertstate="firing"}'
_TIME = re.compile(r'^    expr: "ALERTS.*", time: (?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:0s)?,$', re.MULTILINE)
_ALERT = re.compile(r'\{__name__="ALERTS", ([^}]*)\} 1E\+00')
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Firing:
    """An uninterrupted period in which an alert fires.

    Attributes:
        begins: the first minute in which the alert fires.
        ends: the first minute in which the alert no longer fires.
    """

    alert: str
    labels: Labels
    begins: int
    ends: int


@dataclass(frozen=True, slots=True)
class Part:
    """A group of alerts that one promtool run evaluates.

    Attributes:
        step: minutes between two evaluations.
        model: model whose service level objectives are evaluated, or None for all other alerts.
    """

    name: str
    step: int
    model: str | None = None

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Return the groups of recording rules that the alerts read, followed by the groups of the alerts."""
        is_slo = self.model is not None
        alerts = [
            group for group in groups() if "alert" in group["rules"][0] and (group["name"] == _SLO_ALERTS) is is_slo
        ]
        names = read(alerts)
        return [group for group in groups() if any(rule.get("record") in names for rule in group["rules"])] + alerts

    def has(self, labels: Labels) -> bool:
        """Return whether a series with these labels is read. Requests without a model belong to the main model."""
        model = dict(labels).get("model")
        return self.model is None or self.model == (model if model in MODELS else MAIN)


PARTS = (Part("others", 1), *(Part(f"slo_{model}", 2, model) for model in MODELS))


class Series:
    """The week's samples that alert rules read, one per series and minute."""

    def __init__(self) -> None:
        self._read = read(groups())
        self._buckets = set(re.findall(r'le="([^"]+)"', str(groups())))
        self._values: dict[tuple[str, Labels], list[str]] = {}
        self.minutes = 0

    def add(self, page: Page) -> None:
        """Add the metrics page of the next minute."""
        for series, value in page.items():
            if not self._is_read(*series):
                continue
            values = self._values.setdefault(series, [])
            if len(values) < self.minutes:  # missing samples: Prometheus marks an ended series as stale
                if values:
                    values.append("stale")
                values += ["_"] * (self.minutes - len(values))
            values.append(f"{value:.10g}")
        self.minutes += 1

    def lines(self, part: Part) -> Iterator[str]:
        """Yield the series that a part needs in promtool's format, with repeated values abbreviated.

        Counters that stay 0 are omitted, because no alert fires for them and they make up most of the series.
        """
        names = read(part.groups)
        for (name, labels), values in self._values.items():
            if name not in names or not part.has(labels) or (name.endswith(_COUNTERS) and set(values) == {"0"}):
                continue
            ended = ["stale"] if len(values) < self.minutes else []
            runs = ((value, len(list(run)) - 1) for value, run in groupby([*values, *ended]))
            written = " ".join(f"{value}x{more}" if more else value for value, more in runs)
            inside = ",".join(f'{label}="{value}"' for label, value in sorted((*TARGET, *labels)))
            yield f"      - series: '{name}{{{inside}}}'\n        values: '{written}'\n"

    def _is_read(self, name: str, labels: Labels) -> bool:
        return name in self._read and (
            not name.endswith("_bucket") or name == _LAG or dict(labels)["le"] in self._buckets
        )


def read(rule_groups: Iterable[dict[str, Any]]) -> set[str]:
    """Return all words in the alerts of some groups and in the rules they read, including all series names."""
    recorded = {rule["record"]: rule["expr"] for group in groups() for rule in group["rules"] if "record" in rule}
    expressions = [rule["expr"] for group in rule_groups for rule in group["rules"] if "alert" in rule]
    names = set[str]()
    while expressions:
        new = set(re.findall(r"[\w:]+", expressions.pop())) - names
        names |= new
        expressions += [recorded[name] for name in new & set(recorded)]
    return names


def write_test(series: Series, part: Part, folder: Path) -> Path:
    """Write a promtool test that queries the firing alerts at each evaluation, and return its path."""
    rule_file, file = folder / f"{part.name}_rules.yml", folder / f"{part.name}.yml"
    rule_file.write_text(yaml.safe_dump({"groups": part.groups}, width=1_000), "utf-8")
    with file.open("w", encoding="utf-8") as test:
        test.write(f"rule_files: [{rule_file}]\nevaluation_interval: {part.step}m\n")
        order = ", ".join(
            group["name"] for group in part.groups
        )  # promtool does not know the dependencies between groups
        test.write(f"group_eval_order: [{order}]\n")
        test.write("tests:\n  - interval: 1m\n    input_series:\n")
        test.writelines(series.lines(part))
        test.write("    promql_expr_test:\n")
        minutes = range(0, series.minutes - 1, part.step)  # the last page is the week's end
        test.writelines(f"      - {{expr: '{_FIRING}', eval_time: {minute}m}}\n" for minute in minutes)
    return file


def evaluate(series: Series, promtool: Path, folder: Path) -> list[Firing]:
    """Return the alerts that fire.

    Raises:
        SvcError: promtool cannot evaluate the rules.
    """
    with ThreadPoolExecutor(_PROCESSES) as pool:
        parts = list(pool.map(lambda part: _evaluate(promtool, write_test(series, part, folder), part.step), PARTS))
    return sorted((firing for part in parts for firing in part), key=lambda firing: (firing.begins, firing.alert))


def _evaluate(promtool: Path, file: Path, step: int) -> list[Firing]:
    environment = os.environ | {"GOGC": "400", "GOMAXPROCS": "1"}
    done = subprocess.run([promtool, "test", "rules", file], env=environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    if " err: " in output or (done.returncode != 0 and not _ALERT.search(output)):
        raise SvcError(f"promtool failed: {output[:2000]}", expected="test results from promtool", todo=f"read {file}")
    return firings(output, step)


def firings(output: str, step: int) -> list[Firing]:
    """Return the firing alerts from promtool's output, which reports every one of them as unexpected.

    Args:
        step: minutes between two evaluations.
    """
    minutes: dict[tuple[str, Labels], list[int]] = {}
    parts = _TIME.split(output)
    for days, hours, rest, text in zip(*(parts[start::4] for start in range(1, 5)), strict=True):
        minute = int(days or 0) * 1440 + int(hours or 0) * 60 + int(rest or 0)
        for inside in _ALERT.findall(text):
            labels = {name: value for name, value in _LABEL.findall(inside) if name != "alertstate"}
            alert = labels.pop("alertname")
            remaining = tuple(sorted(item for item in labels.items() if item not in TARGET))
            minutes.setdefault((alert, remaining), []).append(minute)
    return [Firing(*alert, begins, ends) for alert, fired in minutes.items() for begins, ends in _runs(fired, step)]


def _runs(minutes: Sequence[int], step: int) -> Iterator[tuple[int, int]]:
    """Yield the first minute of each gapless run, and the minute of the evaluation after the run."""
    for _, run in groupby(enumerate(sorted(minutes)), key=lambda pair: pair[1] - pair[0] * step):
        members = [minute for _, minute in run]
        yield members[0], members[-1] + step
