"""The files under deploy/prometheus as data, read once. PromQL is parsed only to find names."""

import re
from functools import cache
from typing import Any

import yaml

from tests.docs.pages import ROOT, read

FOLDER = ROOT / "deploy" / "prometheus"
_STRING = re.compile(r'"[^"]*"')


def rules(kind: str) -> list[dict[str, Any]]:
    """Return the rules of the given kind, `alert` or `record`, from rules/*.yml."""
    return [rule for group in groups() for rule in group["rules"] if kind in rule]


@cache
def groups() -> list[dict[str, Any]]:
    """Return the rule groups from rules/*.yml."""
    files = [yaml.safe_load(path.read_text("utf-8")) for path in sorted(FOLDER.glob("rules/*.yml"))]
    return [group for file in files for group in file["groups"]]


@cache
def cases() -> list[dict[str, Any]]:
    """Return the test cases from tests/*.yml."""
    files = [yaml.safe_load(path.read_text("utf-8")) for path in sorted(FOLDER.glob("tests/*.yml"))]
    return [case for file in files for case in file["tests"]]


def metrics(expression: str) -> set[str]:
    """Return the names of our metrics and recorded series in an expression, including `__name__` matches."""
    return set(re.findall(r"(?<![\w:])(?:svc_|(?:job|model)\w*:)[\w:]+", expression))


def read_by(expression: str) -> set[str]:
    """Return all words in an expression and in the recording rules that feed it, including series names."""
    recorded = {rule["record"]: rule["expr"] for rule in rules("record")}
    words, names = [expression], set[str]()
    while words:
        new = set(re.findall(r"[\w:]+", words.pop())) - names
        names |= new
        words += [recorded[word] for word in new & set(recorded)]
    return names


def seconds(duration: str) -> int:
    """Convert a duration in Prometheus notation to seconds."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([smhd])", duration))


def matchers(expression: str) -> list[tuple[str, str, str]]:
    """Return the metric, label and value or pattern of each matcher on one of our metrics."""
    selectors = re.findall(r"\b(svc_\w+)\{([^}]*)\}", expression)
    return [
        (metric, label, value)
        for metric, inside in selectors
        for label, value in re.findall(r'(\w+)\s*[=!]~?\s*"([^"]*)"', inside)
    ]


def grouped_by(expression: str) -> set[str]:
    """Return the labels named in `by`, `without`, `on` and `ignoring` clauses."""
    lists = re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", _STRING.sub("", expression))
    return {label.strip() for inside in lists for label in inside.split(",")}


PAGE = read("docs/metrics.md")
EXPORTED = {
    name: (kind, {label.strip() for label in labels.split(",") if label.strip()})
    for name, kind, labels in re.findall(r"^\| `(svc_\w+)` \| (\w+) \|([\w, ]*)\|", PAGE, re.MULTILINE)
}
RECORDED = {rule["record"] for rule in rules("record")}
