"""The alert rules over the week's pages, evaluated by promtool.

The rules are those of deploy/prometheus/rules, word by word, in two parts that run at the same time: those of the
service level objectives, which look back three days and have no `for`, every two minutes, and all others every minute.
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
from svc.errors import SvcError
from tests.deploy.prometheus_rules import groups, read_by, rules

PROMTOOL = Path(".venv") / "prometheus" / "bin" / "promtool"
TARGET = (("instance", "127.0.0.1:9464"), ("job", "tuneserve"), ("namespace", "production"))
PARTS = {"slo": 2, "others": 1}
"""Minutes between two evaluations."""
_SLO_ALERTS = "tuneserve_slo"
_LAG = "svc_event_loop_lag_seconds_bucket"
"""The only histogram that an alert reads all buckets of."""
_COUNTERS = ("_total", "_count", "_bucket")
_FIRING = 'ALERTS{alertstate="firing"}'
_TIME = re.compile(r'^    expr: "ALERTS.*", time: (?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:0s)?,$', re.MULTILINE)
_ALERT = re.compile(r'\{__name__="ALERTS", ([^}]*)\} 1E\+00')
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Firing:
    """An alert that fires without a pause.

    Attributes:
        begins: the first minute.
        ends: the first minute in which it fires no more.
    """

    alert: str
    labels: Labels
    begins: int
    ends: int


class Series:
    """The samples of the week that an alert rule reads, one per series and minute."""

    def __init__(self) -> None:
        self._read = read(groups())
        self._buckets = set(re.findall(r'le="([^"]+)"', " ".join(rule["expr"] for rule in rules("record"))))
        self._values: dict[tuple[str, Labels], list[str]] = {}
        self.minutes = 0

    def add(self, page: Page) -> None:
        """Add the page of the next minute."""
        for series, value in page.items():
            if not self._is_read(*series):
                continue
            values = self._values.setdefault(series, [])
            if len(values) < self.minutes:  # no sample until now, or none again: Prometheus marks it as stale
                if values:
                    values.append("stale")
                values += ["_"] * (self.minutes - len(values))
            values.append(f"{value:.10g}")
        self.minutes += 1

    def lines(self, read: set[str]) -> Iterator[str]:
        """Return the series of these names as promtool reads them. Runs of one value are written once.

        Counters that stay 0 are left out: no alert fires for them, and they are most of the series.
        """
        for (name, labels), values in self._values.items():
            if name not in read or (name.endswith(_COUNTERS) and set(values) == {"0"}):
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
    """Return the names that the alerts of some groups read, those of recorded series among them."""
    return set[str]().union(
        *(read_by(rule["expr"]) for group in rule_groups for rule in group["rules"] if "alert" in rule)
    )


def part_groups(part: str) -> list[dict[str, Any]]:
    """Return the alerts of a part, and the recording rules that they read, before them."""
    alerts = [
        group
        for group in groups()
        if "alert" in group["rules"][0] and (group["name"] == _SLO_ALERTS) is (part == "slo")
    ]
    names = read(alerts)
    recorded = [group for group in groups() if any(rule.get("record") in names for rule in group["rules"])]
    return recorded + alerts


def write_test(series: Series, part: str, folder: Path) -> Path:
    """Write a test of promtool that asks at each evaluation which alerts fire."""
    rule_groups, step = part_groups(part), PARTS[part]
    rule_file, file = folder / f"{part}_rules.yml", folder / f"{part}.yml"
    rule_file.write_text(yaml.safe_dump({"groups": rule_groups}, width=1_000), "utf-8")
    with file.open("w", encoding="utf-8") as test:
        test.write(f"rule_files: [{rule_file}]\nevaluation_interval: {step}m\n")
        test.write("tests:\n  - interval: 1m\n    input_series:\n")
        test.writelines(series.lines(read(rule_groups)))
        test.write("    promql_expr_test:\n")
        minutes = range(0, series.minutes, step)
        test.writelines(f"      - {{expr: '{_FIRING}', eval_time: {minute}m}}\n" for minute in minutes)
    return file


def evaluate(series: Series, promtool: Path, folder: Path) -> list[Firing]:
    """Return the alerts that fire.

    Raises:
        SvcError: promtool cannot evaluate the rules.
    """
    with ThreadPoolExecutor(len(PARTS)) as pool:
        parts = list(pool.map(lambda part: _evaluate(promtool, write_test(series, part, folder), PARTS[part]), PARTS))
    return sorted((firing for part in parts for firing in part), key=lambda firing: (firing.begins, firing.alert))


def _evaluate(promtool: Path, file: Path, step: int) -> list[Firing]:
    environment = os.environ | {"GOGC": "400", "GOMAXPROCS": "1"}
    done = subprocess.run([promtool, "test", "rules", file], env=environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    if ("SUCCESS" in output) is (done.returncode != 0) or ("FAILED" in output and not _ALERT.search(output)):
        raise SvcError(f"promtool failed: {output[:2000]}", expected="a result", todo=f"read {file}")
    return firings(output, step)


def firings(output: str, step: int) -> list[Firing]:
    """Return the alerts that promtool names as unexpected, as it expects none at any time.

    Args:
        step: minutes between two evaluations.
    """
    minutes: dict[tuple[str, Labels], list[int]] = {}
    parts = _TIME.split(output)
    for days, hours, rest, text in zip(parts[1::4], parts[2::4], parts[3::4], parts[4::4], strict=True):
        minute = int(days or 0) * 1440 + int(hours or 0) * 60 + int(rest or 0)
        for inside in _ALERT.findall(text):
            labels = {name: value for name, value in _LABEL.findall(inside) if name != "alertstate"}
            alert = labels.pop("alertname")
            kept = tuple(sorted(item for item in labels.items() if item not in TARGET))
            minutes.setdefault((alert, kept), []).append(minute)
    return [Firing(*alert, begins, ends) for alert, found in minutes.items() for begins, ends in _runs(found, step)]


def _runs(minutes: Sequence[int], step: int) -> Iterator[tuple[int, int]]:
    """Return the first minute of each run without a gap, and the minute of the evaluation after the run."""
    for _, run in groupby(enumerate(sorted(minutes)), key=lambda pair: pair[1] - pair[0] * step):
        members = [minute for _, minute in run]
        yield members[0], members[-1] + step
