"""Tests that alerts in promtool's output are parsed as intervals and compared with the expected ones."""

import pytest

from benchmarks.week.expected import Expected, compare, read_expected
from benchmarks.week.rules import PARTS, Firing, Series, firings
from benchmarks.week.server import Page
from benchmarks.week.timetable import MODELS, at, moment
from tests.deploy.prometheus_rules import groups

LABELS = (("model", "m"), ("severity", "page"))
EXPECTED = Expected("SvcEngineDown", LABELS, (10, 12), (20, 22), "its engine is down")
OUTPUT = """Unit Testing:  week.yml
  FAILED:
    expr: "ALERTS{alertstate=\\"firing\\"}", time: 1d2h58m,
        exp: nil
        got: {__name__="ALERTS", alertname="SvcDrift", alertstate="firing", job="tuneserve", model="m"} 1E+00
    expr: "ALERTS{alertstate=\\"firing\\"}", time: 1d3h0m0s,
        exp: nil
        got: {__name__="ALERTS", alertname="SvcDrift", alertstate="firing", job="tuneserve", model="m"} 1E+00, \
{__name__="ALERTS", alertname="SvcDrift", alertstate="firing", job="tuneserve", model="n"} 1E+00
    expr: "ALERTS{alertstate=\\"firing\\"}", time: 1d3h4m,
        exp: nil
        got: {__name__="ALERTS", alertname="SvcDrift", alertstate="firing", job="tuneserve", model="m"} 1E+00
"""


def test_alerts_in_consecutive_minutes_count_as_one_alert() -> None:
    assert sorted(firings(OUTPUT, 2), key=lambda firing: (firing.labels, firing.begins)) == [
        Firing("SvcDrift", (("model", "m"),), 1618, 1622),
        Firing("SvcDrift", (("model", "m"),), 1624, 1626),
        Firing("SvcDrift", (("model", "n"),), 1620, 1622),
    ]


@pytest.mark.parametrize(
    ("reported", "right"),
    [
        ([Firing("SvcEngineDown", LABELS, 11, 21)], [True]),
        ([], [False]),
        ([Firing("SvcEngineDown", LABELS, 9, 21)], [False]),
        ([Firing("SvcEngineDown", LABELS, 11, 23)], [False]),
        ([Firing("SvcEngineDown", (("model", "n"),), 11, 21)], [False, False]),
        ([Firing("SvcEngineDown", LABELS, 2, 4), Firing("SvcEngineDown", LABELS, 11, 21)], [True, False]),
    ],
)
def test_alert_is_expected_only_if_its_labels_and_times_match(reported: list[Firing], right: list[bool]) -> None:
    assert [row.as_expected for row in compare([EXPECTED], reported)] == right


def test_every_alert_is_evaluated_for_every_model() -> None:
    alerts = {rule["alert"] for group in groups() for rule in group["rules"] if "alert" in rule}
    for model in MODELS:
        parts = [part for part in PARTS if part.has((("model", model),))]
        evaluated = [
            rule["alert"] for part in parts for group in part.groups for rule in group["rules"] if "alert" in rule
        ]
        assert sorted(evaluated) == sorted(alerts)


def test_rule_test_input_marks_missing_values_as_stale_and_omits_counters_that_stay_zero() -> None:
    series = Series()
    alarm = ("svc_drift_alarm", (("model", "m"),))
    restarts = ("svc_engine_restarts_total", (("model", "m"),))
    pages: tuple[Page, ...] = ({restarts: 0.0}, {alarm: 1.0, restarts: 0.0}, {alarm: 1.0}, {}, {alarm: 0.0}, {})
    for page in pages:
        series.add(page)
    (line,) = series.lines(PARTS[0])
    assert line.splitlines()[1].strip() == "values: '_ 1x1 stale 0 stale'"


def test_every_expected_alert_has_a_rule_and_valid_start_and_end_times() -> None:
    alerts = {rule["alert"] for group in groups() for rule in group["rules"] if "alert" in rule}
    for one in read_expected():
        assert one.alert in alerts
        assert one.begins[0] <= one.begins[1] < one.ends[0] <= one.ends[1]


def test_printed_day_and_time_can_be_parsed_back() -> None:
    assert moment(at("3 11:25")) == "3 11:25"
