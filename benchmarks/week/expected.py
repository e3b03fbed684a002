"""Compares the alerts that the week must raise with those it actually raised."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.week.rules import Firing
from benchmarks.week.server import Labels
from benchmarks.week.timetable import MINUTE_S, at

FILE = Path(__file__).with_name("expected.yml")


@dataclass(frozen=True, slots=True)
class Expected:
    """An expected alert from expected.yml.

    Attributes:
        begins, ends: earliest and latest minute in which the alert must begin, and in which it must end.
    """

    alert: str
    labels: Labels
    begins: tuple[int, int]
    ends: tuple[int, int]
    reason: str

    def allows(self, firing: Firing) -> bool:
        """Return whether a firing is this alert at the expected time."""
        return (
            (self.alert, self.labels) == (firing.alert, firing.labels)
            and self.begins[0] <= firing.begins <= self.begins[1]
            and self.ends[0] <= firing.ends <= self.ends[1]
        )


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the comparison: an expected alert, an alert that fired, or both."""

    expected: Expected | None
    found: Firing | None

    @property
    def as_expected(self) -> bool:
        """Return whether the alert fired at the expected time."""
        return self.expected is not None and self.found is not None and self.expected.allows(self.found)


def read_expected(file: Path = FILE) -> list[Expected]:
    """Return the expected alerts read from the file."""
    return [_expected(entry) for entry in yaml.safe_load(file.read_text("utf-8"))]


def compare(expected: list[Expected], firings: list[Firing]) -> list[Row]:
    """Return a row for each expected alert, followed by a row for each unexpected alert that fired.

    An expected alert is matched with the first firing that has its name and labels, preferring a firing at
    the expected time.
    """
    rows, remaining = list[Row](), one_of_features(firings)
    for alert in expected:
        same = [firing for firing in remaining if (firing.alert, firing.labels) == (alert.alert, alert.labels)]
        match = next((firing for firing in same if alert.allows(firing)), same[0] if same else None)
        if match:
            remaining.remove(match)
        rows.append(Row(alert, match))
    return rows + [Row(None, firing) for firing in remaining]


def one_of_features(firings: list[Firing]) -> list[Firing]:
    """Return the alerts without their `feature` label, merging concurrent alerts of several features into one.

    This is because expected.yml does not predict which features show a change.
    """
    merged = dict[tuple[str, Labels], list[Firing]]()
    for firing in sorted(firings, key=lambda firing: firing.begins):
        labels = tuple(label for label in firing.labels if label[0] != "feature")
        same = merged.setdefault((firing.alert, labels), [])
        if same and same[-1].ends >= firing.begins:
            last = same.pop()
            same.append(Firing(firing.alert, labels, last.begins, max(last.ends, firing.ends)))
        else:
            same.append(Firing(firing.alert, labels, firing.begins, firing.ends))
    return [firing for group in merged.values() for firing in group]


def _expected(entry: dict[str, Any]) -> Expected:
    begins, ends = (tuple(at(moment) // MINUTE_S for moment in entry[key]) for key in ("begins", "ends"))
    labels = tuple(sorted(entry["labels"].items()))
    return Expected(entry["alert"], labels, (begins[0], begins[1]), (ends[0], ends[1]), entry["reason"])
