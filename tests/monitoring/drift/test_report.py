"""Tests the lines of a drift report and the examples of an alarm."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from monitoring.drift.report import EXAMPLES, Line, feature_line, most_moved
from svc.drift_reference.sample import NOT_THERE, Sample

NAN = float("nan")
LINE = TypeAdapter(Line)
numbers = st.lists(st.floats(-1e9, 1e9) | st.just(NAN), max_size=20)
names = st.lists(st.sampled_from(["stop", "length", "tool", NOT_THERE]), max_size=20)


def lengths(*values: float) -> Sample:
    return Sample(len(values), {"length": np.array(values, dtype=np.float64)})


def reasons(*values: str) -> Sample:
    return Sample(len(values), {}, {"reason": np.array(values, dtype=np.str_)})


def test_report_line_compares_medians_of_numeric_features() -> None:
    line = feature_line("length", 0.5, lengths(1.0, 2.0, 3.0, NAN), lengths(NAN, 1234.5, 20.0, 3e4))
    assert line is not None
    assert (line.name, line.evidence, line.expected, line.live) == ("length", 0.5, "2", "1.23e+03")


def test_report_line_compares_shares_of_the_category_that_changed_most() -> None:
    line = feature_line("reason", 1.0, reasons(*["stop"] * 90, *["length"] * 10), reasons("length", "stop", NOT_THERE))
    assert line is not None
    assert (line.expected, line.live) == ("length 10%", "length 50%")


def test_report_line_names_a_new_category() -> None:
    reference, live = reasons(*["stop"] * 8, *["length"] * 2), reasons(*["error"] * 5, *["stop"] * 4, "length")
    line = feature_line("reason", 1.0, reference, live)
    assert line is not None
    assert (line.expected, line.live) == ("error 0%", "error 50%")


def test_larger_change_in_a_feature_gets_a_higher_score_in_the_drift_report() -> None:
    reference = lengths(*range(200))
    scores = [feature_line("length", 0.0, reference, lengths(*range(by, by + 200))) for by in (0, 30, 100, 300)]
    found = [line.score for line in scores if line]
    assert found == sorted(found) and found[-1] > 1


@pytest.mark.parametrize("live", [lengths(), lengths(NAN), lengths(NAN, NAN)])
def test_numeric_feature_has_no_report_line_if_no_live_item_has_a_value(live: Sample) -> None:
    assert feature_line("length", 0.0, lengths(1.0, 2.0), live) is None


@pytest.mark.parametrize("live", [reasons(), reasons(NOT_THERE)])
def test_categorical_feature_has_no_report_line_if_no_live_item_has_a_category(live: Sample) -> None:
    assert feature_line("reason", 0.0, reasons("stop"), live) is None


def test_report_line_shows_a_dash_if_the_reference_has_no_value() -> None:
    of_number = feature_line("length", 0.0, lengths(NAN), lengths(1.0))
    of_name = feature_line("reason", 0.0, reasons(NOT_THERE), reasons("stop"))
    assert of_number and of_name
    assert (of_number.expected, of_name.expected) == ("-", "-")


@given(numbers, numbers, names, names)
def test_report_line_survives_json_round_trip(
    numbers: list[float], live_numbers: list[float], names: list[str], live_names: list[str]
) -> None:
    lines = (
        feature_line("length", 0.25, lengths(*numbers), lengths(*live_numbers)),
        feature_line("reason", 0.25, reasons(*names), reasons(*live_names)),
    )
    for line in lines:
        assert line is None or LINE.validate_json(LINE.dump_json(line)) == line


def test_examples_are_ordered_farthest_from_reference_first_then_newest_first() -> None:
    live = lengths(10.0, 99.0, NAN, 12.0, 99.0, -60.0, 11.0)
    assert most_moved("length", lengths(10.0, 11.0, 12.0, NAN), live) == [4, 1, 5, 3, 0]


def test_alarm_examples_are_the_newest_items_of_the_category_that_grew() -> None:
    live = reasons("length", "stop", "error", NOT_THERE, "error", "error")
    assert most_moved("reason", reasons(*["stop"] * 90, *["length"] * 10), live)[:3] == [5, 4, 2]


@pytest.mark.parametrize("live", [lengths(NAN, 5.0, NAN), lengths(NAN, 1.0, NAN)])
def test_items_without_a_value_rank_last_among_examples(live: Sample) -> None:
    assert most_moved("length", lengths(1.0), live)[0] == 1


@pytest.mark.parametrize(("size", "expected"), [(0, 0), (1, 1), (20, EXAMPLES)])
def test_at_most_5_alarm_examples_are_shown(size: int, expected: int) -> None:
    assert len(most_moved("length", lengths(1.0, 2.0), lengths(*[3.0] * size))) == expected


def test_alarm_examples_without_a_category_rank_above_those_of_a_category_that_shrank() -> None:
    live = reasons(NOT_THERE, "stop", "length", NOT_THERE)
    assert most_moved("reason", reasons(*["stop"] * 9, "length"), live) == [2, 3, 0, 1]
